// Attention of a level with instructions for pairs of bfloat16; the rest is the level below. Compiled like level.cpp
// with 16 lanes.
#include "level.h"

#include "attention_pairs.h"

int UF_JOIN(uf_attention_, UF_LEVEL)(const uf::Attention& a) {
  return UF_NAMESPACE::attention<UF_NAMESPACE::bf16, UF_NAMESPACE::Pairs>(a);
}
