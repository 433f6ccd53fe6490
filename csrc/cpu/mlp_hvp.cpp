// Hessian-vector products of multilayer perceptrons on the CPU: a block of the batch goes forward and
// back through all layers while its tangents are in L2.
#include <cstring>
#include <memory>
#include <vector>

#include "../mlp.h"
#include "buffer.h"
#include "mlp_gemm.h"
#include "mlp_pack.h"
#include "mlp_split.h"
#include "share.h"

namespace hg::cpu {
namespace {

// Last layers that fill at most one of so many parts of a padded row are multiplied along their inputs.
constexpr int64_t kNarrow = 4;
// Matrices with longer rows are put into panels apart; the rows of others are fetched ahead by hand.
constexpr int64_t kWideBytes = 576;
// Rows of the network that are packed once and kept, at most so many bytes; else a block's are packed for every vector.
constexpr int64_t kHiddenBytes = 32 << 20;
// Matrices whose part of H v is added up where it belongs, if their rows fill cache lines. Larger ones leave the nearer
// caches, and take 1.1 times as long there where H v is new memory.
constexpr int64_t kInPlaceBytes = 1 << 20;
// Multiply-adds per thread below which waking another thread costs more than it saves.
constexpr int64_t kGrainOps = 1 << 20;
// Inputs and outputs, and rows, from which on matrix units are faster: packing is little of the work.
constexpr int64_t kLeastSide = 192, kLeastRows = 192;

// Where a layer's parts are in v, in the packed copy of v and in the padded sum of H v.
struct Layout {
  int64_t in, out;          // padded
  int64_t in_row, out_row;  // from row to row of matrices of these widths
  int64_t v_weight, v_bias;
  int64_t transposed, rows;      // in the packed copy; -1 where v itself will do
  int64_t w_transposed, w_rows;  // in the packed copy of W; -1 where it is not needed, or W itself will do
  int64_t hidden;                // in a block's packed rows of the network; -1 where its own will do
  int64_t bias;                  // in the padded copy of v's
  bool in_place;  // whether its part of H v may be added up where it belongs
  int64_t sum, sum_bias;
  int64_t tangent;  // row elements before this layer's, in a block's tangents
};

// Outputs of a layer, as many at most as panels take at once.
struct Piece {
  size_t layer;
  int64_t begin, end;
};

// How the batch is cut.
struct Cut {
  int64_t rows, blocks;
};

// Right: how right factors of matrix products lie.
template <class Right>
class Product {
 public:
  using Real = typename Right::Real;
  static constexpr int64_t kPiece = 2 * kMlpPadding / static_cast<int64_t>(sizeof(Real));

  explicit Product(const MlpData& data) : data_(data), layers_(data.layers) {
    for (const MlpLayer& layer : layers_) {
      Layout at;
      at.in = padded(layer.in), at.out = padded(layer.out);
      at.in_row = spread(at.in), at.out_row = spread(at.out);
      at.v_weight = take(v_size_, layer.in * layer.out);
      at.v_bias = take(v_size_, data.biases ? layer.out : 0);
      const int64_t transposed = Right::size(layer.in, layer.out);
      const int64_t rows = Right::size(layer.out, layer.in);
      const bool back = !layout_.empty();  // the input has no tangent
      const bool along_inputs = &layer == &layers_.back() && narrow(layer, at);
      at.transposed = along_inputs ? -1 : take(packed_size_, transposed);
      at.rows = back && (packed(at.in) || at.in != layer.in) ? take(packed_size_, rows) : -1;
      at.w_transposed = back && !along_inputs ? take(weights_size_, transposed) : -1;
      at.w_rows = back && packed(at.in) ? take(weights_size_, rows) : -1;
      at.hidden = packed(at.in) ? take(hidden_columns_, (at.in + kPiece - 1) / kPiece * kPiece) : -1;
      at.bias = take(bias_size_, at.out);
      at.in_place = at.in == layer.in && layer.out * layer.in < kInPlaceBytes / static_cast<int64_t>(sizeof(Real));
      at.sum = take(sum_size_, layer.out * at.in_row);
      at.sum_bias = take(sum_size_, at.out);
      at.tangent = take(tangent_size_, at.out_row);
      widest_ = std::max(widest_, at.out_row);
      ops_ += 6 * layer.in * layer.out;
      for (int64_t o = 0; o < layer.out; o += kPiece)
        pieces_.push_back({layout_.size(), o, std::min(o + kPiece, layer.out)});
      layout_.push_back(at);
    }
    const int64_t row_bytes = 2 * tangent_size_ * sizeof(Real);
    max_rows_ = std::clamp<int64_t>(Right::kTangentBytes / row_bytes / Right::kRows * Right::kRows, Right::kLeastRows,
                                    Right::kMostRows);
  }

  int64_t size() const { return v_size_; }
  int64_t ops() const { return ops_ * data_.n; }

  void pack_weights(const Team& team) {
    if (weights_) return;
    weights_ = std::make_unique<Buffer<Real>>(weights_size_);
    each_piece(team, [&](const Piece& piece) {
      const Layout& at = layout_[piece.layer];
      const Rows& weight = layers_[piece.layer].weight;
      pack_matrix(piece, real(weight), weight.stride, weights_->get(), at.w_transposed, at.w_rows);
    });
  }

  // As many blocks for every thread.
  Cut cut(int64_t threads) const {
    constexpr int64_t kUnit = Right::kRows;
    int64_t blocks = std::max<int64_t>(1, (data_.n + max_rows_ - 1) / max_rows_);
    blocks = (blocks + threads - 1) / threads * threads;
    const int64_t rows =
        std::clamp<int64_t>(((data_.n + blocks - 1) / blocks + kUnit - 1) / kUnit * kUnit, kUnit, max_rows_);
    return {rows, (data_.n + rows - 1) / rows};
  }

  // Whether matrices are packed in advance, by all threads. A thread that has a single block packs them as it uses
  // them: they stay in its nearest caches.
  static bool in_advance(const Cut& cut, int64_t threads) { return cut.blocks > threads; }

  // Packs the rows of the network, unless they are, or are too many.
  void pack_hidden(const Cut& cut, const Team& team) {
    const int64_t size = Right::size(cut.rows, hidden_columns_);
    if (cut.rows == hidden_rows_ || cut.blocks * size * static_cast<int64_t>(sizeof(Real)) > kHiddenBytes) return;
    hidden_ = std::make_unique<Buffer<Real>>(cut.blocks * size);
    share(cut.blocks, team, [&](int64_t i) {
      pack_block(i * cut.rows, std::min(cut.rows, data_.n - i * cut.rows), hidden_->get() + i * size);
    });
    hidden_rows_ = cut.rows;
  }

  // H v for k vectors one after another, on so many threads.
  void run(const Real* v, int64_t k, Real* out, int64_t threads) const {
    const Cut cut = this->cut(threads);
    const auto [rows, blocks] = cut;
    const bool kept = rows == hidden_rows_, packs_block = Right::kInPlace && !kept, packs_v = in_advance(cut, threads);
    const int64_t hidden_size = Right::size(rows, hidden_columns_), block_size = packs_block ? hidden_size : 0;
    // In one piece, because an allocator returns large pieces to the system: it would fault them in again.
    const int64_t scratch_size = block_size + 2 * rows * (tangent_size_ + widest_) + memory_size(rows);
    const int64_t thread_size = sum_size_ + scratch_size, v_memory = bias_size_ + (packs_v ? packed_size_ : 0);
    const Buffer<Real> memory(v_memory + threads * thread_size);
    Real *const biases = memory.get(), *const packed = packs_v ? biases + bias_size_ : nullptr;
    Real* const sums = biases + v_memory;
    const Team team{threads, ops() >= kPatience * kGrainOps};
    // Threads without a block have no sum.
    const int64_t added = std::min(threads, blocks);
    for (; k-- > 0; v += v_size_, out += v_size_) {
      each_piece(team, [&](const Piece& piece) { pack(piece, v, biases, packed); });
      share(added, team, [&](int64_t t) {
        Real *sum = sums + t * thread_size, *scratch = sum + sum_size_;
        const int64_t first = t * blocks / added;
        for (int64_t i = first; i < (t + 1) * blocks / added; ++i) {
          const int64_t count = std::min(rows, data_.n - i * rows);
          const Real* hidden = kept ? hidden_->get() + i * hidden_size : packs_block ? scratch : nullptr;
          if (packs_block) pack_block(i * rows, count, scratch);
          const Sum to{sum, t == 0 ? out : nullptr, i == first};
          add_block({v, biases, packed}, i * rows, count, hidden, scratch + block_size, to);
        }
      });
      each_piece(team, [&](const Piece& piece) { unpack(piece, sums, added, thread_size, v, out); });
    }
  }

 private:
  static int64_t padded(int64_t size) {
    constexpr int64_t kUnit = kMlpPadding / sizeof(Real);
    return (size + kUnit - 1) / kUnit * kUnit;
  }
  // Rows a multiple of 512 bytes apart would share a few sets of the cache, and drive each other out of it.
  static int64_t spread(int64_t width) {
    constexpr int64_t kUnit = kMlpPadding / sizeof(Real);
    return width % (8 * kUnit) ? width : width + kUnit;
  }
  static bool narrow(const MlpLayer& layer, const Layout& at) {
    return Right::kInPlace && kNarrow * layer.out <= at.out;
  }
  static bool wide(int64_t columns) { return columns * static_cast<int64_t>(sizeof(Real)) > kWideBytes; }
  static bool packed(int64_t columns) { return !Right::kInPlace || wide(columns); }
  static int64_t take(int64_t& total, int64_t size) { return (total += size) - size; }
  static const Real* real(const Rows& m, int64_t row = 0) {
    return m.data ? static_cast<const Real*>(m.data) + row * m.stride : nullptr;
  }

  template <class F>
  void each_piece(const Team& team, const F& f) const {
    const int64_t pieces = static_cast<int64_t>(pieces_.size()), ranges = team.ranges(pieces, 2);
    share(ranges, team, [&](int64_t range) {
      for (int64_t i = range * pieces / ranges; i < (range + 1) * pieces / ranges; ++i) f(pieces_[i]);
    });
  }

  // A piece of a layer's matrix: its transpose for the way forward, itself for the way back, or what of them is wanted.
  void pack_matrix(const Piece& piece, const Real* matrix, int64_t stride, Real* packed, int64_t transposed,
                   int64_t rows) const {
    const MlpLayer& layer = layers_[piece.layer];
    const int64_t begin = piece.begin, count = piece.end - begin;
    matrix += begin * stride;
    if (transposed >= 0) Right::pack_columns(matrix, stride, begin, count, layer.in, packed + transposed);
    if (rows >= 0) Right::pack_rows(matrix, stride, begin, count, layer.in, packed + rows, layer.out);
  }

  // A piece of v, if there is place for it, and the padded biases.
  void pack(const Piece& piece, const Real* v, Real* biases, Real* packed) const {
    const MlpLayer& layer = layers_[piece.layer];
    const Layout& at = layout_[piece.layer];
    if (packed) pack_matrix(piece, v + at.v_weight, layer.in, packed, at.transposed, at.rows);
    if (piece.begin > 0) return;
    std::memset(biases + at.bias, 0, at.out * sizeof(Real));
    if (data_.biases) std::memcpy(biases + at.bias, v + at.v_bias, layer.out * sizeof(Real));
  }

  // H v from the sums of so many threads.
  void unpack(const Piece& piece, const Real* sums, int64_t threads, int64_t thread_size, const Real* v,
              Real* out) const {
    const Real l2 = static_cast<Real>(2 * data_.l2);
    const MlpLayer& layer = layers_[piece.layer];
    const Layout& at = layout_[piece.layer];
    for (int64_t o = piece.begin; o < piece.end; ++o) {
      const Real *from = sums + at.sum + o * at.in_row, *vector = v + at.v_weight + o * layer.in;
      Real* to = out + at.v_weight + o * layer.in;
      if (!at.in_place || threads == 0)
        for (int64_t i = 0; i < layer.in; ++i) to[i] = (threads > 0 ? from[i] : Real(0)) + l2 * vector[i];
      else if (l2 != 0)
        for (int64_t i = 0; i < layer.in; ++i) to[i] += l2 * vector[i];
      for (int64_t t = 1; t < threads; ++t)
        for (int64_t i = 0; i < layer.in; ++i) to[i] += from[t * thread_size + i];
      if (!data_.biases) continue;
      Real& bias = out[at.v_bias + o] = 0;
      for (int64_t t = 0; t < threads; ++t) bias += sums[t * thread_size + at.sum_bias + o];
    }
  }

  // Rows of the network where they are wide.
  void pack_block(int64_t begin, int64_t rows, Real* hidden) const {
    for (size_t l = 0; l < layers_.size(); ++l) {
      const MlpLayer& layer = layers_[l];
      if (const int64_t at = layout_[l].hidden; at >= 0)
        Right::pack_rows(real(layer.hidden, begin), layer.hidden.stride, 0, rows, layer.in,
                         hidden + Right::size(rows, at), rows);
    }
  }

  // A right factor: a matrix, or its transpose; at `at` of what is packed, if it is.
  static Right as_it_is(const Real* packed, int64_t at, const Real* matrix, int64_t stride, int64_t rows,
                        int64_t columns, Real* memory) {
    if (at < 0) return Right::rows(matrix, stride, rows, columns);
    return packed ? Right::apart(packed + at, rows) : Right::late_rows(matrix, stride, rows, columns, memory);
  }
  static Right transposed(const Real* packed, int64_t at, const Real* matrix, int64_t stride, const MlpLayer& layer,
                          Real* memory) {
    if (at < 0) return Right::rows(matrix, stride, layer.out, layer.in);
    return packed ? Right::apart(packed + at, layer.in)
                  : Right::late_columns(matrix, stride, layer.out, layer.in, memory);
  }

  // For the factors of one product.
  int64_t memory_size(int64_t rows) const {
    int64_t size = 0;
    for (const MlpLayer& layer : layers_)
      size = std::max({size, 2 * Right::memory_size(rows, std::max(layer.in, layer.out)),
                       2 * Right::memory_size(layer.out, rows), 2 * late_size(layer)});
    return size;
  }

  // For a right factor that is packed when it is used.
  static int64_t late_size(const MlpLayer& layer) {
    return std::max(Right::late_size(layer.in, layer.out), Right::late_size(layer.out, layer.in));
  }

  // A vector, its biases padded, and its matrices packed or null.
  struct Vector {
    const Real *v, *biases, *packed;
  };

  // Where a thread adds up its part of H v.
  struct Sum {
    Real *padded, *out;  // out: H v itself for the first thread, else null
    bool first;          // whether it is the thread's first block, which writes

    Accumulate<Real> weights(const Layout& at, const MlpLayer& layer) const {
      if (out && at.in_place) return {out + at.v_weight, layer.in, first};
      return {padded + at.sum, at.in_row, first};
    }
  };

  // Adds the part of H v that rows [begin, begin + rows) of the batch contribute.
  void add_block(const Vector& vector, int64_t begin, int64_t rows, const Real* hidden, Real* scratch,
                 const Sum& sum) const {
    const auto [v, biases, packed] = vector;
    const Real* const weights = weights_ ? weights_->get() : nullptr;
    Real *tangents = scratch, *curved = tangents + rows * tangent_size_;
    Real *delta = curved + rows * tangent_size_, *next_delta = delta + rows * widest_;
    Real* memory = next_delta + rows * widest_;
    const size_t last = layers_.size() - 1;
    for (size_t l = 0; l <= last; ++l) {
      const MlpLayer& layer = layers_[l];
      const Layout& at = layout_[l];
      const bool along_inputs = l == last && narrow(layer, at);
      const Factors<Right> by_v{real(layer.hidden, begin), layer.hidden.stride,
                                transposed(packed, at.transposed, v + at.v_weight, layer.in, layer, memory), layer.in};
      Factors<Right> by_w{};
      if (l > 0)
        by_w = {tangents + rows * layout_[l - 1].tangent, at.in_row,
                transposed(weights, at.w_transposed, real(layer.weight), layer.weight.stride, layer,
                           memory + late_size(layer)),
                layer.in};
      const int terms = l > 0 ? 2 : 1;
      if (l < last)
        for (const Rows* m : {&layers_[l + 1].hidden, &layers_[l + 1].slope, &layers_[l + 1].bend})
          fetch(*m, begin, rows);
      if (along_inputs) {
        if constexpr (Right::kInPlace)
          NarrowGemm<Real>::run({{by_v, by_w}, terms, rows, layer.out, {biases + at.bias, delta, at.out_row}});
      } else if (l == last) {
        Gemm<Right, PlusBias>::run(
            {{by_v, by_w}, terms, rows, filled<Real>(layer.out), {biases + at.bias, delta, at.out_row}, memory});
      } else {
        Gemm<Right, ThroughActivation>::run(
            {{by_v, by_w},
             terms,
             rows,
             filled<Real>(layer.out),
             {biases + at.bias, real(layer.slope, begin), real(layer.bend, begin), layer.slope.stride,
              layer.bend.stride, tangents + rows * at.tangent, curved + rows * at.tangent, at.out_row},
             memory});
      }
    }
    differentiate_loss(delta, begin, rows);
    for (size_t l = last + 1; l-- > 0; std::swap(delta, next_delta)) {
      const MlpLayer& layer = layers_[l];
      const Layout& at = layout_[l];
      // The layers' rows lie one after another.
      const Factors<Right> of_delta{delta, at.out_row,
                                    as_it_is(hidden, at.hidden < 0 ? -1 : Right::size(rows, at.hidden),
                                             real(layer.hidden, begin), layer.hidden.stride, rows, layer.in, memory),
                                    rows};
      if (data_.biases) ColumnSums<Real>::run({delta, at.out_row, rows, layer.out, sum.padded + at.sum_bias, sum.first});
      if (l == 0) {
        Gemm<Right, Accumulate>::run(
            {{of_delta, {}}, 1, layer.out, filled<Real>(layer.in), sum.weights(at, layer), memory});
        break;
      }
      const MlpLayer& before = layers_[l - 1];
      for (const Rows* m : {&before.hidden, &before.slope, &before.delta}) fetch(*m, begin, rows);
      const Right tangent = Right::rows(tangents + rows * layout_[l - 1].tangent, at.in_row, rows, layer.in);
      const Factors<Right> of_tangent{real(layer.delta, begin), layer.delta.stride, tangent, rows};
      Gemm<Right, Accumulate>::run(
          {{of_delta, of_tangent}, 2, layer.out, filled<Real>(layer.in), sum.weights(at, layer), memory});
      const Factors<Right> by_w{
          delta, at.out_row,
          as_it_is(weights, at.w_rows, real(layer.weight), layer.weight.stride, layer.out, layer.in, memory), layer.out};
      const Factors<Right> by_v{real(layer.delta, begin), layer.delta.stride,
                                as_it_is(packed, at.rows, v + at.v_weight, layer.in, layer.out, layer.in,
                                         memory + late_size(layer)),
                                layer.out};
      Gemm<Right, BackThroughActivation>::run(
          {{by_w, by_v},
           2,
           rows,
           filled<Real>(layer.in),
           {real(before.slope, begin), before.bend.data ? curved + rows * layout_[l - 1].tangent : nullptr,
            before.slope.stride, at.in_row, next_delta, at.in_row},
           memory});
    }
  }

  // Sends for the rows of a block ahead of their use: layers are too short for the hardware to see where it goes.
  static void fetch(const Rows& m, int64_t begin, int64_t rows) {
    if (!m.data || wide(m.stride)) return;
    const char* at = static_cast<const char*>(m.data) + begin * m.stride * sizeof(Real);
    for (const char* end = at + rows * m.stride * sizeof(Real); at < end; at += kMlpPadding)
      __builtin_prefetch(at, 0, 2);
  }

  // R(dL/dz) from Rz, in place: p (Rz - <p, Rz>) scale, or Rz scale.
  void differentiate_loss(Real* z, int64_t begin, int64_t rows) const {
    const int64_t classes = layers_.back().out, stride = layout_.back().out_row;
    const Real scale = static_cast<Real>(data_.scale);
    for (int64_t r = 0; r < rows; ++r, z += stride) {
      const Real* p = real(data_.probabilities, begin + r);
      Real mean = 0;
      if (p)
        for (int64_t c = 0; c < classes; ++c) mean += p[c] * z[c];
      for (int64_t c = 0; c < classes; ++c) z[c] = scale * (p ? p[c] * (z[c] - mean) : z[c]);
    }
  }

  const MlpData& data_;
  const std::vector<MlpLayer>& layers_;
  std::vector<Layout> layout_;
  int64_t v_size_ = 0, bias_size_ = 0, packed_size_ = 0, weights_size_ = 0, sum_size_ = 0, tangent_size_ = 0,
          hidden_columns_ = 0;
  int64_t widest_ = 0, max_rows_ = 0, ops_ = 0;
  std::vector<Piece> pieces_;
  std::unique_ptr<Buffer<Real>> weights_, hidden_;
  int64_t hidden_rows_ = 0;  // of a block of what is packed
};

template <class Right>
MlpProduct prepared(const MlpData& data, bool often) {
  using Real = typename Right::Real;
  const auto product = std::make_shared<Product<Right>>(data);
  const auto is_apart = [product](int64_t k, int64_t threads) {
    // With vectors enough for all threads each does whole products, and there is nothing to add up.
    return threads > 1 && k >= 2 * threads && k * product->ops() >= 2 * kGrainOps;
  };
  const auto team_of = [product, is_apart](int64_t k) {
    const int64_t all = at::get_num_threads(), ops = product->ops();
    const bool several = is_apart(k, all) || ops >= 2 * kGrainOps;
    const Team team{several ? all : 1, k * ops >= kPatience * kGrainOps};
    return has_help(team) ? team : Team{1, false};
  };
  const auto multiply = [product, often, is_apart, team_of](const void* vectors, int64_t k, void* products) {
    const Real* v = static_cast<const Real*>(vectors);
    Real* out = static_cast<Real*>(products);
    const Team team = team_of(k);
    const bool apart = is_apart(k, team.threads);
    const int64_t size = product->size(), together = apart ? 1 : team.threads;
    lead(team, [&] {
      const Cut cut = product->cut(together);
      if (often || k > 1 || product->in_advance(cut, together)) product->pack_weights(team);
      if (often || k > 1) product->pack_hidden(cut, team);
      if (!apart) return product->run(v, k, out, together);
      share(team.threads, team, [&](int64_t t) {
        const int64_t first = t * k / team.threads, last = (t + 1) * k / team.threads;
        product->run(v + first * size, last - first, out + first * size, 1);
      });
    });
  };
  return {multiply, team_of};
}

// Whether most of the work is in layers whose sides fill tiles, and wide enough for packing to be little of it.
bool split_suits(const MlpData& data) {
  if (!has_amx() || data.n < kLeastRows) return false;
  int64_t ops = 0, suitable = 0;
  for (const MlpLayer& layer : data.layers) {
    ops += layer.in * layer.out;
    if (std::min(layer.in, layer.out) >= kLeastSide) suitable += layer.in * layer.out;
  }
  return 4 * suitable >= 3 * ops;
}

}  // namespace

MlpProduct mlp_product(const MlpData& data, bool often) {
  if (data.dtype == DType::f64) return prepared<Panels<double>>(data, often);
  return split_suits(data) ? prepared<SplitRight>(data, often) : prepared<Panels<float>>(data, often);
}

}  // namespace hg::cpu
