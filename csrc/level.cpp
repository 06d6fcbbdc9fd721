// One ISA level: setup.py compiles this file once per level, with its flags, UF_LEVEL (its name) and UF_WIDTH.
#include "level.h"

#include "attention.h"
#include "attention_backward.h"
#include "gelu.h"
#include "rope.h"
#include "token_backward.h"
#include "token_ops.h"

extern const uf::Kernels UF_JOIN(uf_kernels_, UF_LEVEL);
const uf::Kernels UF_JOIN(uf_kernels_, UF_LEVEL) = {
    UF_NAMESPACE::PANEL,
    UF_NAMESPACE::MAX_QUERIES,
    {UF_NAMESPACE::attention<float, UF_NAMESPACE::Wide<float>>,
     UF_NAMESPACE::attention<UF_NAMESPACE::bf16, UF_NAMESPACE::Wide<UF_NAMESPACE::bf16>>},
    UF_NAMESPACE::attention_backward,
    UF_NAMESPACE::qk_norm_rope,
    UF_NAMESPACE::qk_norm_rope_backward,
    UF_NAMESPACE::token_op,
    UF_NAMESPACE::token_op_backward,
    UF_NAMESPACE::gelu,
};
