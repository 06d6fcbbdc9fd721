// One ISA level: setup.py compiles this file once per level, with its flags, UF_LEVEL (its name) and UF_WIDTH.
#define UF_JOIN_(a, b) a##b
#define UF_JOIN(a, b) UF_JOIN_(a, b)
#define UF_NAMESPACE UF_JOIN(uf_, UF_LEVEL)

#include "attention.h"
#include "token_ops.h"

extern const uf::Kernels UF_JOIN(uf_kernels_, UF_LEVEL);
const uf::Kernels UF_JOIN(uf_kernels_, UF_LEVEL) = {
    UF_NAMESPACE::PANEL,     UF_NAMESPACE::MAX_QUERIES,  UF_NAMESPACE::attention,
    UF_NAMESPACE::qk_norm_rope, UF_NAMESPACE::token_rows,
};
