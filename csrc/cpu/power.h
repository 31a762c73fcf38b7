// |x|^p on vectors of doubles, for the norms of any order. Included only by isa_*.cpp.

#pragma once

#include "vec.h"

namespace gradclip::cpu::GRADCLIP_ISA {

/// The polynomial with these coefficients, the highest power's first, by Horner's rule.
template <typename... Double>
GRADCLIP_INLINE F64 polynomial(F64 x, double highest, Double... others) {
  F64 sum = F64{} + highest;
  ((sum = sum * x + others), ...);
  return sum;
}

/// log2(x / pivot) for a finite x > 0, where pivot = 2^exponent * 2^fraction. The exponents cancel
/// exactly, so the error is about 2 ulp of 1 or of the result, not of log2(x).
GRADCLIP_INLINE F64 log2_ratio(F64 x, double exponent, double fraction) {
  // x = 2^k m with sqrt(1/2) <= m < sqrt(2), split in integer arithmetic.
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdull, kOne = 0x3ff0000000000000ull;
  const I64 subnormal = x < DBL_MIN;
  const U64 bits = (U64)(subnormal ? x * 0x1p54 : x) + (kOne - kSqrtHalf);
  const F64 m = (F64)((bits & 0x000fffffffffffffull) + kSqrtHalf);
  // Put into the last bits of 2^52, the biased exponent needs no conversion to a floating-point
  // number.
  F64 k = (F64)(bits >> 52 | 0x4330000000000000ull) - (0x1p52 + 1023.0);
  k = subnormal ? k - 54.0 : k;
  // log(m) = 2 atanh(s), |s| < 0.172: the first omitted term is below 2^-53 of the sum.
  const F64 s = (m - 1.0) / (m + 1.0), z = s * s;
  const F64 series = polynomial(z, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9,
                                1.0 / 7, 1.0 / 5, 1.0 / 3);
  constexpr double kTwoOverLn2 = 2.885390081777926815;
  return (k - exponent) + ((s * kTwoOverLn2 + s * z * series * kTwoOverLn2) - fraction);
}

/// 2^y to about 2 ulp; inf above the range of doubles and 0 below that of normal ones.
GRADCLIP_INLINE F64 exp2(F64 y) {
  const I64 over = y >= 1024.0, under = y < -1021.0;
  const F64 exponent = over ? F64{} : under ? F64{} : y;
  // Adding 1.5 * 2^52 rounds to an integer, which the last bits then hold.
  const F64 shifted = exponent + 0x1.8p52,
            r = (exponent - (shifted - 0x1.8p52)) * 0.6931471805599453;
  // Taylor's series of e^r, |r| < 0.347: the first omitted term is below 2^-52.
  const F64 series =
      polynomial(r, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0);
  const F64 power = (F64)((U64)series + ((U64)shifted << 52));
  return over ? F64{} + HUGE_VAL : under ? F64{} : power;
}

}  // namespace gradclip::cpu::GRADCLIP_ISA
