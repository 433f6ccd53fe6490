// The pointwise part of an LSTM step on the CPU, forward, backward and backward of the backward: one pass each.
#include "lstm_rows.h"
#include "share.h"

namespace hg::cpu {
namespace {

// Units per thread below which a second thread costs more than it saves.
constexpr int64_t kGrainUnits = 1 << 13;

template <class T, class Real>
struct Cell {
  template <class Tiles>
  using Body = LstmRows<T, Real, Tiles>;
};

template <class T, class Real, class Data>
void run(const LstmSize& size, const Data& data) {
  static const auto rows =
      ForTiles<Cell<T, Real>::template Body, const LstmSize&, const Data&, int64_t, int64_t>::get();
  const Team team = team_for(size.rows * size.units, kGrainUnits);
  const int64_t ranges = team.ranges(size.rows, 4);
  share(ranges, team,
        [&](int64_t range) { rows(size, data, range * size.rows / ranges, (range + 1) * size.rows / ranges); });
}

template <class Data>
void for_dtype(const LstmSize& size, const Data& data) {
  switch (size.dtype) {
    case DType::f64:
      return run<double, double>(size, data);
    case DType::f32:
      return run<float, float>(size, data);
    case DType::bf16:
      return run<BFloat16, float>(size, data);
    case DType::f16:
      return run<Float16, float>(size, data);
  }
}

}  // namespace

void lstm_cell(const LstmSize& size, const LstmForward& data) { for_dtype(size, data); }
void lstm_cell(const LstmSize& size, const LstmBackward& data) { for_dtype(size, data); }
void lstm_cell(const LstmSize& size, const LstmDoubleBackward& data) { for_dtype(size, data); }

}  // namespace hg::cpu
