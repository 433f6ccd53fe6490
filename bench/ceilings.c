// What the machine can do at best: compiled and called by ceilings.py, for the machine that it runs on.
#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
typedef float V __attribute__((vector_size(BYTES)));
typedef float Unaligned __attribute__((vector_size(BYTES), aligned(4), may_alias));

long lanes(void) { return BYTES / 4; }

// Multiply-adds of 12 independent chains: as many as hide their latency in 16 registers.
float multiply_add(long steps) {
  V s0 = {}, s1 = {}, s2 = {}, s3 = {}, s4 = {}, s5 = {}, s6 = {}, s7 = {}, s8 = {}, s9 = {}, sa = {}, sb = {};
  V a = s0 + 1.0001f, b = s0 + 0.5f;
  for (long i = 0; i < steps; ++i) {
    __asm__ volatile("" : "+v"(a), "+v"(b));
    s0 += a * b, s1 += a * b, s2 += a * b, s3 += a * b, s4 += a * b, s5 += a * b;
    __asm__ volatile("" : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5));
    s6 += a * b, s7 += a * b, s8 += a * b, s9 += a * b, sa += a * b, sb += a * b;
    __asm__ volatile("" : "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9), "+v"(sa), "+v"(sb));
  }
  return (s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + sa + sb)[0];
}

float read_all(const float* x, long n, long times) {
  V s[8] = {};
  for (; times > 0; --times)
    for (long i = 0; i + 2 * BYTES <= n; i += 2 * BYTES)
#pragma GCC unroll 8
      for (int u = 0; u < 8; ++u) s[u] += *(const Unaligned*)(x + i + BYTES / 4 * u);
  return (s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7])[0];
}
