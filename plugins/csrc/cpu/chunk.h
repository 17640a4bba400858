// The least run of columns that fills whole vectors at each code width.

#ifndef EORACC_CPU_CHUNK_H_
#define EORACC_CPU_CHUNK_H_

#include <stdint.h>

namespace eoracc {

// Whether codes of this width exist.
static constexpr bool is_code_width(int64_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 6 || bits == 8;
}

// Quads of a chunk, and bytes of its vectors.
static constexpr int64_t chunk_quads(int64_t bits) {
  return bits == 8 ? 1 : bits == 4 ? 2 : bits == 3 ? 8 : 4;
}
static constexpr int64_t chunk_bytes(int64_t bits) { return chunk_quads(bits) * 8 * bits; }

}  // namespace eoracc

#endif  // EORACC_CPU_CHUNK_H_
