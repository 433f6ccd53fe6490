// Hessian-vector products of multilayer perceptrons on the CPU: threads take blocks of the batch through the network.
#include <cstring>
#include <memory>
#include <type_traits>

#include "../mlp.h"
#include "buffer.h"
#include "lift.h"
#include "mlp_layout.h"
#include "mlp_pack.h"
#include "mlp_pass.h"
#include "mlp_split.h"
#include "share.h"

namespace hg::cpu {
namespace {

// Rows of the network that are packed once and kept, at most so many bytes; else a block's are packed for every vector.
constexpr int64_t kHiddenBytes = 32 << 20;
// Multiply-adds per thread below which waking another thread costs more than it saves.
constexpr int64_t kGrainOps = 1 << 20;
// Inputs and outputs, and rows, from which on matrix units are faster: packing is little of the work.
constexpr int64_t kLeastSide = 192, kLeastRows = 192;

// How the batch is cut.
struct Cut {
  int64_t rows, blocks;
};

// Right: how right factors of matrix products lie.
template <class Right>
class Product {
 public:
  using Real = typename Right::Real;

  explicit Product(const MlpData& data) : data_(data), layers_(data.layers), layout_(data), pass_(data, layout_) {}

  int64_t size() const { return layout_.v_size; }
  int64_t ops() const { return layout_.ops * data_.n; }

  void pack_weights(const Team& team) {
    if (weights_) return;
    weights_ = std::make_unique<Buffer<Real>>(layout_.weights_size);
    each_piece(team, [&](const MlpPiece& piece) {
      const MlpLayerLayout& at = layout_.layers[piece.layer];
      const Rows& weight = layers_[piece.layer].weight;
      pack_matrix(piece, row_of<Real>(weight), weight.stride, weights_->get(), at.w_transposed, at.w_rows);
    });
  }

  // As many blocks for every thread.
  Cut cut(int64_t threads) const {
    constexpr int64_t kUnit = Right::kRows;
    int64_t blocks = std::max<int64_t>(1, (data_.n + layout_.max_rows - 1) / layout_.max_rows);
    blocks = (blocks + threads - 1) / threads * threads;
    const int64_t rows =
        std::clamp<int64_t>(((data_.n + blocks - 1) / blocks + kUnit - 1) / kUnit * kUnit, kUnit, layout_.max_rows);
    return {rows, (data_.n + rows - 1) / rows};
  }

  // Whether matrices are packed in advance, by all threads. A thread that has a single block packs them as it uses
  // them: they stay in its nearest caches.
  static bool in_advance(const Cut& cut, int64_t threads) { return cut.blocks > threads; }

  // Packs the rows of the network, unless they are, or are too many.
  void pack_hidden(const Cut& cut, const Team& team) {
    const int64_t size = Right::size(cut.rows, layout_.hidden_size);
    if (cut.rows == hidden_rows_ || cut.blocks * size * static_cast<int64_t>(sizeof(Real)) > kHiddenBytes) return;
    hidden_ = std::make_unique<Buffer<Real>>(cut.blocks * size);
    share(cut.blocks, team, [&](int64_t i) {
      const int64_t begin = i * cut.rows, rows = std::min(cut.rows, data_.n - begin);
      for (size_t l = 0; l < layers_.size(); ++l)
        if (const int64_t at = layout_.layers[l].hidden; at >= 0)
          Right::pack_rows(row_of<Real>(layers_[l].hidden, begin), layers_[l].hidden.stride, 0, rows, layers_[l].in,
                           hidden_->get() + i * size + Right::size(rows, at), rows);
    });
    hidden_rows_ = cut.rows;
  }

  // H v for k vectors one after another, on so many threads.
  void run(const Real* v, int64_t k, Real* out, int64_t threads) const {
    const Cut cut = this->cut(threads);
    const auto [rows, blocks] = cut;
    const Real* const hidden = rows == hidden_rows_ ? hidden_->get() : nullptr;
    const int64_t hidden_size = Right::size(rows, layout_.hidden_size);
    const int64_t packed_size = in_advance(cut, threads) ? layout_.packed_size : 0;
    const int64_t sum_size = layout_.sum_size, thread_size = sum_size + pass_.scratch_size(rows);
    // In one piece, because an allocator returns large pieces to the system: it would fault them in again.
    const Buffer<Real> memory(layout_.bias_size + packed_size + threads * thread_size);
    Real *const biases = memory.get(), *const packed = biases + layout_.bias_size, *const sums = packed + packed_size;
    const Team team{threads, ops() >= kPatience * kGrainOps};
    // Threads without a block have no sum.
    const int64_t added = std::min(threads, blocks);
    for (; k-- > 0; v += size(), out += size()) {
      pad_biases(v, biases);
      if (packed_size > 0)
        each_piece(team, [&](const MlpPiece& piece) {
          const MlpLayerLayout& at = layout_.layers[piece.layer];
          pack_matrix(piece, v + at.v_weight, layers_[piece.layer].in, packed, at.transposed, at.rows);
        });
      const typename MlpPass<Right>::Vector vector{v, biases, packed_size > 0 ? packed : nullptr,
                                                   weights_ ? weights_->get() : nullptr};
      share(added, team, [&](int64_t t) {
        Real* sum = sums + t * thread_size;
        const int64_t first = t * blocks / added;
        for (int64_t i = first; i < (t + 1) * blocks / added; ++i)
          pass_.add(vector,
                    {i * rows, std::min(rows, data_.n - i * rows), hidden ? hidden + i * hidden_size : nullptr,
                     sum + sum_size},
                    {sum, t == 0 ? out : nullptr, i == first});
      });
      each_piece(team, [&](const MlpPiece& piece) { finish(piece, sums, added, thread_size, v, out); });
    }
  }

 private:
  template <class F>
  void each_piece(const Team& team, const F& f) const {
    const int64_t pieces = static_cast<int64_t>(layout_.pieces.size()), ranges = team.ranges(pieces, 2);
    share(ranges, team, [&](int64_t range) {
      for (int64_t i = range * pieces / ranges; i < (range + 1) * pieces / ranges; ++i) f(layout_.pieces[i]);
    });
  }

  // A piece of a layer's matrix: its transpose for the way forward, itself for the way back, or what of them is wanted.
  void pack_matrix(const MlpPiece& piece, const Real* matrix, int64_t stride, Real* packed, int64_t transposed,
                   int64_t rows) const {
    const MlpLayer& layer = layers_[piece.layer];
    const int64_t begin = piece.begin, count = piece.end - begin;
    matrix += begin * stride;
    if (transposed >= 0) Right::pack_columns(matrix, stride, begin, count, layer.in, packed + transposed);
    if (rows >= 0) Right::pack_rows(matrix, stride, begin, count, layer.in, packed + rows, layer.out);
  }

  void pad_biases(const Real* v, Real* biases) const {
    std::memset(biases, 0, layout_.bias_size * sizeof(Real));
    if (!data_.biases) return;
    for (size_t l = 0; l < layers_.size(); ++l) {
      const MlpLayerLayout& at = layout_.layers[l];
      std::memcpy(biases + at.bias, v + at.v_bias, layers_[l].out * sizeof(Real));
    }
  }

  // H v from the sums of so many threads.
  void finish(const MlpPiece& piece, const Real* sums, int64_t threads, int64_t thread_size, const Real* v,
              Real* out) const {
    const Real l2 = static_cast<Real>(2 * data_.l2);
    const MlpLayer& layer = layers_[piece.layer];
    const MlpLayerLayout& at = layout_.layers[piece.layer];
    for (int64_t o = piece.begin; o < piece.end; ++o) {
      const Real *from = sums + at.sum + o * at.in_row, *vector = v + at.v_weight + o * layer.in;
      Real* to = out + at.v_weight + o * layer.in;
      if (!at.direct || threads == 0)
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

  const MlpData& data_;
  const std::vector<MlpLayer>& layers_;
  const MlpLayout<Right> layout_;
  const MlpPass<Right> pass_;
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
  const auto run = [product, often, is_apart, team_of](const Real* v, int64_t k, Real* out) {
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
  const auto multiply = [product, run](const void* vectors, int64_t k, void* products) {
    const Real* v = static_cast<const Real*>(vectors);
    Real* out = static_cast<Real*>(products);
    if constexpr (std::is_same_v<Right, SplitRight>)
      lifted(v, k, product->size(), out, [&](const Real* v, Real* out) { run(v, k, out); });
    else
      run(v, k, out);
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
