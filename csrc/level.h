// Names of an ISA level: everything it uses lives in a namespace of its own (simd.h says why).
#pragma once

#define UF_JOIN_(a, b) a##b
#define UF_JOIN(a, b) UF_JOIN_(a, b)
#define UF_NAMESPACE UF_JOIN(uf_, UF_LEVEL)
