// Latents <-> token stream, 2x2 patches. A copy: no arithmetic, so no ISA levels, and elements are opaque bits.
#include <stdint.h>

#define UF_API extern "C" __attribute__((visibility("default")))

namespace {

// latent[channel][frame][row][column] with strides; its tokens start at `start` and are ordered frame, row, column.
struct Latent {
  int64_t data, start, frames, grid_height, grid_width, strides[4];
};

constexpr int64_t BLOCK = 32;  // tokens per turn: one channel's lines are read whole, the block written stays in L1

// Tokens of one grid row: stream[column][channel][dy][dx] <-> latent[channel][2 row + dy][2 column + dx].
template <class T, bool kPack>
void copy_row(const Latent& latent, int64_t frame, int64_t row, int64_t channels, T* stream) {
  T* base = reinterpret_cast<T*>(latent.data) + frame * latent.strides[1] + 2 * row * latent.strides[2];
  const int64_t dy = latent.strides[2], dx = latent.strides[3];
  for (int64_t begin = 0; begin < latent.grid_width; begin += BLOCK) {
    const int64_t end = begin + BLOCK < latent.grid_width ? begin + BLOCK : latent.grid_width;
    for (int64_t channel = 0; channel < channels; channel++) {
      T* plane = base + channel * latent.strides[0];
      for (int64_t column = begin; column < end; column++) {
        T* pixel = plane + 2 * column * dx;
        T* token = stream + (column * channels + channel) * 4;
        if (kPack) {
          token[0] = pixel[0], token[1] = pixel[dx];
          token[2] = pixel[dy], token[3] = pixel[dy + dx];
        } else {
          pixel[0] = token[0], pixel[dx] = token[1];
          pixel[dy] = token[2], pixel[dy + dx] = token[3];
        }
      }
    }
  }
}

template <class T, bool kPack>
void copy_latents(const Latent* latents, int64_t count, int64_t channels, T* stream, int threads) {
#pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    const Latent& latent = latents[i];
    const int64_t rows = latent.frames * latent.grid_height;
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < rows; r++)
      copy_row<T, kPack>(latent, r / latent.grid_height, r % latent.grid_height, channels,
                         stream + (latent.start + r * latent.grid_width) * 4 * channels);
  }
}

}  // namespace

// latents: 9 int64 each: data pointer, first token, frames, grid height, grid width, strides of c, f, h, w (elements).
UF_API void uf_copy_patches(int threads, int element_bytes, int unpack, const int64_t* latents, int64_t count,
                            int64_t channels, void* stream) {
  const Latent* list = reinterpret_cast<const Latent*>(latents);
  if (element_bytes == 2) {
    if (unpack) copy_latents<uint16_t, false>(list, count, channels, static_cast<uint16_t*>(stream), threads);
    else copy_latents<uint16_t, true>(list, count, channels, static_cast<uint16_t*>(stream), threads);
  } else {
    if (unpack) copy_latents<uint32_t, false>(list, count, channels, static_cast<uint32_t*>(stream), threads);
    else copy_latents<uint32_t, true>(list, count, channels, static_cast<uint32_t*>(stream), threads);
  }
}
