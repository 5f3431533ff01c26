// left · rightᵀ of bfloat16 matrices with fp32 results: torch's own block product of the CPU, which Python cannot call.
//
// Pairs of neighbouring elements of a row go through the hardware together, so both matrices are read as 32-bit words.
// A panel of right's rows is transposed word by word into the layout that the block product wants, stays in the cache,
// and meets all of left's rows there.

#include <cstdint>
#include <vector>

namespace c10 {
struct BFloat16;
}

// Declared here, not included: torch's headers take half a minute to compile. A torch whose functions differ does not
// load this.
namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_c,
            const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

constexpr int64_t kColumns = 64, kRows = 64, kWords = 16;

// As many words as the widest registers hold.
typedef uint32_t Words __attribute__((vector_size(4 * kWords), aligned(4)));

// One of log2(16) steps that transpose 16 rows of 16 words: blocks of `size` words right above the diagonal change
// place with those below it.
template <int size>
static inline void exchange(Words (&rows)[kWords]) {
  Words upper, lower;
  for (int lane = 0; lane < kWords; ++lane) {
    upper[lane] = lane & size ? kWords + lane - size : lane;
    lower[lane] = lane & size ? kWords + lane : lane + size;
  }
  for (int row = 0; row < kWords; ++row) {
    if (row & size) continue;
    const Words first = rows[row], second = rows[row + size];
    rows[row] = __builtin_shuffle(first, second, upper);
    rows[row + size] = __builtin_shuffle(first, second, lower);
  }
}

static inline void transpose(const uint32_t* from, int64_t stride, uint32_t* panel) {
  Words rows[kWords];
  for (int row = 0; row < kWords; ++row) rows[row] = *reinterpret_cast<const Words*>(from + row * stride);
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
  for (int row = 0; row < kWords; ++row) *reinterpret_cast<Words*>(panel + row * kColumns) = rows[row];
}

// Shapes: left [rows, words], right [columns, words], out [rows, columns]; strides are of rows, in elements of the
// pointer's type. Returns 0, or 1 where this processor has no such product.
extern "C" int bfloat16_product(const uint32_t* left, const uint32_t* right, float* out, int64_t rows, int64_t columns,
                                int64_t words, int64_t left_stride, int64_t right_stride, int64_t out_stride, int threads) {
  const int64_t panels = (columns + kColumns - 1) / kColumns;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
  {
    std::vector<uint32_t> panel(words * kColumns);
#pragma omp for
    for (int64_t number = 0; number < panels; ++number) {
      const int64_t first = number * kColumns, width = columns - first < kColumns ? columns - first : kColumns;
      const int64_t transposed = width == kColumns ? words / kWords * kWords : 0;
      for (int64_t column = 0; column < kColumns; column += kWords)
        for (int64_t word = 0; word < transposed; word += kWords)
          transpose(right + (first + column) * right_stride + word, right_stride,
                    panel.data() + word * kColumns + column);
      for (int64_t word = transposed; word < words; ++word)
        for (int64_t column = 0; column < width; ++column)
          panel[word * kColumns + column] = right[(first + column) * right_stride + word];
      for (int64_t row = 0; row < rows && !failed; row += kRows) {
        const int64_t height = rows - row < kRows ? rows - row : kRows;
        try {
          at::native::cpublas::brgemm(height, width, 2 * words, 2 * left_stride, kColumns, out_stride, false,
                                      reinterpret_cast<const c10::BFloat16*>(left + row * left_stride),
                                      reinterpret_cast<const c10::BFloat16*>(panel.data()),
                                      out + row * out_stride + first, true);
        } catch (...) {
          failed = 1;
        }
      }
    }
    try {
      at::native::cpublas::brgemm_release(true);
    } catch (...) {
    }
  }
  return failed;
}
