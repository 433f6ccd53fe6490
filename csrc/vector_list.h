// A vector stored as a list of tensors, and several such lists walked together.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

namespace hg {

enum class DType : int { f64, f32, bf16, f16 };

inline int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Rounding unit of the state's arithmetic.
inline double epsilon(DType state) {
  return state == DType::f64 ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
}

// One tensor of a list: `numel` contiguous elements per row, rows `row_stride` elements apart.
struct Span {
  char* data;
  int64_t numel;
  int64_t row_stride;
};

// A list of tensors read as one vector per row: the concatenation of its spans.
struct VectorList {
  std::vector<Span> spans;
  DType dtype = DType::f32;
};

// N lists of equal total length, cut into the pieces that are contiguous in all of them. The lists
// need not be cut at the same places: flat buffers for v and p go with a list of gradients for Hv.
template <int N>
class AlignedPieces {
 public:
  using Pointers = std::array<char*, N>;

  // Elements of every row from `begin` to the begin of the next piece, or to numel().
  struct Piece {
    Pointers data;
    std::array<int64_t, N> row_bytes;
    int64_t begin;
  };

  explicit AlignedPieces(const std::array<VectorList, N>& lists) {
    for (int i = 0; i < N; ++i) item_size_[i] = size_of(lists[i].dtype);
    pieces_.reserve(lists[N - 1].spans.size() + N);
    std::array<size_t, N> at{};
    std::array<int64_t, N> used{};
    for (;;) {
      int64_t size = std::numeric_limits<int64_t>::max();
      for (int i = 0; i < N; ++i) {
        const auto& spans = lists[i].spans;
        while (at[i] < spans.size() && used[i] == spans[at[i]].numel) ++at[i], used[i] = 0;
        if (at[i] == spans.size()) return;
        size = std::min(size, spans[at[i]].numel - used[i]);
      }
      Piece piece;
      piece.begin = numel_;
      for (int i = 0; i < N; ++i) {
        const Span& span = lists[i].spans[at[i]];
        piece.data[i] = span.data + used[i] * item_size_[i];
        piece.row_bytes[i] = span.row_stride * item_size_[i];
        used[i] += size;
      }
      numel_ += size;
      pieces_.push_back(piece);
    }
  }

  int64_t numel() const { return numel_; }
  const std::vector<Piece>& pieces() const { return pieces_; }
  int64_t piece_numel(size_t i) const {
    return (i + 1 < pieces_.size() ? pieces_[i + 1].begin : numel_) - pieces_[i].begin;
  }

  // Calls f(pointers, size) for the contiguous runs of elements [begin, end) of one row.
  template <class F>
  void visit(int64_t row, int64_t begin, int64_t end, const F& f) const {
    auto piece =
        std::upper_bound(pieces_.begin(), pieces_.end(), begin, [](int64_t e, const Piece& p) { return e < p.begin; });
    for (--piece; begin < end; ++piece) {
      const int64_t piece_end = piece + 1 == pieces_.end() ? numel_ : (piece + 1)->begin;
      const int64_t stop = std::min(end, piece_end);
      Pointers at;
      for (int i = 0; i < N; ++i)
        at[i] = piece->data[i] + row * piece->row_bytes[i] + (begin - piece->begin) * item_size_[i];
      f(at, stop - begin);
      begin = stop;
    }
  }

 private:
  std::vector<Piece> pieces_;
  std::array<int64_t, N> item_size_{};
  int64_t numel_ = 0;
};

}  // namespace hg
