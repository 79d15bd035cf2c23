#include "key_search_tables.hpp"

#include <cmath>

#include "operands.hpp"

namespace commvq::cuda {

KeySearchTables::KeySearchTables(const std::vector<KeyCodebook<float>>& codebooks,
                                 const KeyEncoderView& keys, double row_scale) {
  for (const KeyCodebook<float>& codebook : codebooks)
    for (int group = 0; group < codebook.config.num_groups(); ++group)
      for (int stage = 0; stage < keys.num_stages; ++stage)
        add_stage(codebook.book(group, stage, 0), keys, row_scale);
}

/// `books`: both of a stage, one after the other.
void KeySearchTables::add_stage(const float* books, const KeyEncoderView& keys, double row_scale) {
  const int size = keys.codebook_size, row_size = keys.row_size;
  rows.insert(rows.end(), books, books + Index{2} * size * row_size);
  const auto dot = [&](int n, int m) {
    double sum = 0;
    for (int i = 0; i < row_size; ++i)
      sum += double{books[n * row_size + i]} * books[m * row_size + i];
    return sum;
  };
  for (int n = 0; n < 2 * size; ++n) squared_norms.push_back(static_cast<float>(dot(n, n)));
  const std::size_t cross = cross_terms.size();
  const auto term = [&](int a, int b) {
    return cross_terms[cross + static_cast<std::size_t>(a * size + b)];
  };
  for (int a = 0; a < size; ++a)
    for (int b = 0; b < size; ++b) cross_terms.push_back(static_cast<float>(2 * dot(a, size + b)));
  for (int b = 0; b < size; ++b)
    for (int a = 0; a < keys.padded_size; ++a)
      cross_terms_by_b.push_back(a < size ? term(a, b) : 0.0f);
  const double largest = largest_of(
      std::vector<float>(cross_terms.begin() + static_cast<Index>(cross), cross_terms.end()));
  const double unit = largest / kLargestCrossTerm;
  cross_units.push_back(static_cast<float>(unit));
  for (int b = 0; b < size && keys.screens(); b += 2)
    for (int a = 0; a < keys.padded_size; ++a) {
      std::uint32_t pair = 0;
      for (int k = 0; k < 2 && a < size && unit > 0; ++k) {
        const auto rounded =
            static_cast<std::int16_t>(std::nearbyint(double{term(a, b + k)} / unit));
        pair |= static_cast<std::uint32_t>(static_cast<std::uint16_t>(rounded)) << (16 * k);
      }
      rounded_cross_terms.push_back(pair);
    }
  for (int tile = 0; tile < keys.padded_books / 8; ++tile)
    for (int step = 0; step < keys.padded_row_size / 16; ++step)
      for (int lane = 0; lane < 32; ++lane)
        add_lane_operands(operands, lane, [&](int k, int column) {
          const int n = tile * 8 + column, i = step * 16 + k;
          return n >= 2 * size || i >= row_size ? 0.0 : double{books[n * row_size + i]} * row_scale;
        });
}

}  // namespace commvq::cuda
