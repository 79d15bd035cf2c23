// A program of the headers alone: codes a key in double precision and checks that RoPE commutes
// with decoding.
#include <cmath>
#include <cstdio>
#include <random>

#include "commvq/core/bit_packing.hpp"
#include "commvq/key_codec/encoder.hpp"
#include "commvq/rope/rope.hpp"

int main() {
  commvq::RopeConfig rope_config;
  rope_config.pairs.head_dim = rope_config.pairs.rotary_dim = 16;
  commvq::KeyCodecConfig config = commvq::KeyCodecConfig::paper_2bit(rope_config.pairs);
  config.codebook_size = 8;

  commvq::KeyCodebook<double> codebook(config);
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (double& x : codebook.rows) x = normal(random);
  codebook.derive_tied_books();
  const commvq::KeyEncoder<double> encoder(codebook);

  std::vector<double> key(16), decoded(16), rotation(16), rotated_sum(16);
  for (double& x : key) x = normal(random);
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(config.num_codes()));
  double squared_error = 0;
  encoder.encode(commvq::as_matrix(std::as_const(key), 1, 16), 4,
                 commvq::as_matrix(codes, 1, config.num_codes()), &squared_error);

  const commvq::Rope rope(rope_config);
  rope.rotation_at(1000, rotation.data());
  double found = 0, commutes = 0;
  for (int which = 0; which < config.num_codes(); ++which) {
    std::vector<double> row(16);
    std::copy_n(codebook.book(0, which / 2, which % 2) + codes[which] * 16, 16, row.begin());
    for (int i = 0; i < 16; ++i) decoded[i] += row[i];
    commvq::Rope::rotate_planar(row.data(), rotation.data(), 8);
    for (int i = 0; i < 16; ++i) rotated_sum[i] += row[i];
  }
  for (int i = 0; i < 16; ++i) found += std::pow(key[i] - decoded[i], 2);
  commvq::Rope::rotate_planar(decoded.data(), rotation.data(), 8);
  for (int i = 0; i < 16; ++i) commutes += std::abs(decoded[i] - rotated_sum[i]);
  std::printf("error %.6f and %.6f, rotations differ by %.1e\n", squared_error, found, commutes);
  return std::abs(found - squared_error) < 1e-9 && commutes < 1e-12 ? 0 : 1;
}
