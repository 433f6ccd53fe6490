// What the kernels of a convolution read: an image in the middle of zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../plan.h"
#include "isa.h"

namespace hg::cpu {

// Elements read past the end of an image by the last vectors of its last row.
constexpr int64_t kSlack = 64;

// One image, padded, and for strides above 1 taken apart: pixels that the same taps meet lie beside each other.
struct Image {
  int64_t inputs, rows, columns;  // of a part; a part for every channel and every remainder by the strides
  std::vector<int64_t> taps;      // where a tap meets the first pixel of the result

  explicit Image(const plan::Convolution& c) {
    const auto& w = c.w.sizes;
    const auto steps = [&](int d) { return c.y.sizes[2 + d] + (w[2 + d] - 1) * c.dilation[d] / c.stride[d]; };
    inputs = w[1], rows = steps(0), columns = steps(1);
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t r = 0; r < w[2]; ++r)
        for (int64_t q = 0; q < w[3]; ++q) {
          const int64_t down = r * c.dilation[0], along = q * c.dilation[1];
          const int64_t part = (i * c.stride[0] + down % c.stride[0]) * c.stride[1] + along % c.stride[1];
          taps.push_back((part * rows + down / c.stride[0]) * columns + along / c.stride[1]);
        }
  }
  int64_t size(const plan::Convolution& c) const {
    return inputs * c.stride[0] * c.stride[1] * rows * columns + kSlack;
  }
};

template <class Real>
struct ConvolutionTask {
  const plan::Convolution& c;
  const Image& image;
  const Real *x, *w, *y;  // one of w and y is the result
  Real* padded;           // the image
  Real* turned;           // of y: the pixels' vectors of outputs, one after another
  Real* factors;          // by weight: the sums; else w in the order in which it is read
  int64_t first, last;    // images

  // The pixels of an image in their places; what is around them was set to zero before.
  HG_INLINE void pad(int64_t n) const {
    const plan::View& v = c.x;
    for (int64_t part = 0, i = 0; i < image.inputs; ++i)
      for (int64_t a = 0; a < c.stride[0]; ++a)
        for (int64_t b = 0; b < c.stride[1]; ++b, ++part) {
          const Real* from = x + n * v.strides[0] + i * v.strides[1];
          Real* to = padded + part * image.rows * image.columns;
          // Of column w in the image, w + padding = stride * j + b.
          const auto [low, high] = inside(1, b);
          const auto [top, bottom] = inside(0, a);
          for (int64_t r = top; r < bottom; ++r) {
            const Real* row = from + (r * c.stride[0] + a - c.padding[0]) * v.strides[2];
            const int64_t step = c.stride[1] * v.strides[3];
            const Real* pixel = row + (low * c.stride[1] + b - c.padding[1]) * v.strides[3];
            Real* at = to + r * image.columns + low;
            if (step == 1)
              for (int64_t j = 0; j < high - low; ++j) at[j] = pixel[j];
            else
              for (int64_t j = 0; j < high - low; ++j) at[j] = pixel[j * step];
          }
        }
  }

  // Rows (d = 0) or columns (1) of a part that are pixels, not padding.
  HG_INLINE std::pair<int64_t, int64_t> inside(int d, int64_t remainder) const {
    const int64_t stride = c.stride[d], shift = c.padding[d] - remainder, most = d ? image.columns : image.rows;
    const int64_t low = shift > 0 ? (shift + stride - 1) / stride : 0;
    const int64_t high = (c.x.sizes[2 + d] + shift + stride - 1) / stride;
    return {low, std::max(low, std::min(most, high))};
  }
};

}  // namespace hg::cpu
