#include "binary_search_tables.hpp"

#include <algorithm>

#include "operands.hpp"

namespace commvq::cuda {
namespace {

using Vector = std::vector<double>;

double dot(const Vector& x, const Vector& y) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

/// One head's books in double: what a stage adds in any case, and what its bits switch on.
struct Head {
  std::vector<Vector> bases;  ///< [num_stages]
  std::vector<Vector> bits;   ///< [2 * num_stages]

  explicit Head(const KeyCodebook<float>& codebook) {
    const auto width = static_cast<std::size_t>(codebook.row_size());
    for (int stage = 0; stage < codebook.config.num_stages; ++stage) {
      Vector& base = bases.emplace_back(width);
      for (int which = 0; which < 2; ++which) {
        const float* const row = codebook.book(0, stage, which);
        Vector& bit = bits.emplace_back(width);
        for (std::size_t i = 0; i < width; ++i) {
          base[i] += row[i];
          bit[i] = double{row[width + i]} - row[i];
        }
      }
    }
  }

  int num_bytes() const { return static_cast<int>(bases.size()) / 4; }

  /// Column `column` of a byte's sixteen; null: zeros.
  const Vector* column(int byte, int column) const {
    if (column < 8) return &bits[static_cast<std::size_t>(8 * byte + column)];
    if (column % 2 != 0) return nullptr;
    return &bases[static_cast<std::size_t>(4 * byte + (column - 8) / 2)];
  }
};

void add_offsets(const Head& head, std::vector<float>& offsets) {
  Vector before(head.bases[0].size());  // the sum of the bases of the stages before
  for (int byte = 0; byte < head.num_bytes(); ++byte) {
    double of_byte[kBinaryColumns] = {};
    for (int t = 0; t < 4; ++t) {
      const Vector& base = head.bases[static_cast<std::size_t>(4 * byte + t)];
      of_byte[8 + 2 * t] = 2 * dot(before, base) + dot(base, base);
      for (std::size_t i = 0; i < base.size(); ++i) before[i] += base[i];
      for (int which = 0; which < 2; ++which) {
        const Vector& bit = head.bits[static_cast<std::size_t>(8 * byte + 2 * t + which)];
        of_byte[2 * t + which] = 2 * dot(before, bit) + dot(bit, bit);
      }
    }
    offsets.insert(offsets.end(), of_byte, of_byte + kBinaryColumns);
  }
}

void add_steps(const Head& head, std::vector<BinaryStep>& steps) {
  for (std::size_t stage = 0; stage < head.bases.size(); ++stage) {
    const Vector& a = head.bits[2 * stage];
    const Vector& b = head.bits[2 * stage + 1];
    for (std::size_t t = 0; t < 4; ++t) {
      BinaryStep& step = steps.emplace_back();
      step.both = static_cast<float>(2 * dot(a, b));
      if (const std::size_t later = stage / 4 * 4 + t; later > stage) {
        const auto product = [](const Vector& x, const Vector& y) {
          return static_cast<float>(2 * dot(x, y));
        };
        step.a_to_a = product(a, head.bits[2 * later]);
        step.b_to_a = product(b, head.bits[2 * later]);
        step.a_to_b = product(a, head.bits[2 * later + 1]);
        step.b_to_b = product(b, head.bits[2 * later + 1]);
        step.a_to_base = product(a, head.bases[later]);
        step.b_to_base = product(b, head.bases[later]);
      }
    }
  }
}

/// 2 <bit, column> for the bits of earlier bytes; others are zero.
double gram(const Head& head, int byte, int column, int bit) {
  const Vector* const of_column = head.column(byte, column);
  if (of_column == nullptr || bit >= 8 * byte) return 0;
  return 2 * dot(head.bits[static_cast<std::size_t>(bit)], *of_column);
}

}  // namespace

BinarySearchTables::BinarySearchTables(const std::vector<KeyCodebook<float>>& codebooks) {
  std::vector<Head> heads(codebooks.begin(), codebooks.end());
  const int num_bytes = heads[0].num_bytes();
  const int width = codebooks[0].row_size();
  std::vector<Vector> all_grams;  // of a head: [bytes][columns][bits before, to 16]
  double largest_number = 0, largest_gram = 0;
  for (const Head& head : heads) {
    for (const std::vector<Vector>* vectors : {&head.bases, &head.bits})
      for (const Vector& vector : *vectors)
        largest_number = std::max(largest_number, largest_of(vector));
    Vector& grams_of_head = all_grams.emplace_back();
    for (int byte = 0; byte < num_bytes; ++byte)
      for (int column = 0; column < kBinaryColumns; ++column)
        for (int bit = 0; bit < 16 * binary_steps_of(byte); ++bit)
          grams_of_head.push_back(gram(head, byte, column, bit));
    largest_gram = std::max(largest_gram, largest_of(grams_of_head));
    add_offsets(head, offsets);
    add_steps(head, steps);
  }
  direction_scale = scale_for(largest_number);
  gram_scale = scale_for(largest_gram);

  for (std::size_t h = 0; h < heads.size(); ++h)
    for (int byte = 0; byte < num_bytes; ++byte) {
      for (int step = 0; step < (width + 15) / 16; ++step)
        for (int tile = 0; tile < 2; ++tile)
          for (int lane = 0; lane < 32; ++lane)
            add_lane_operands(directions, lane, [&](int k, int n) {
              const Vector* const column = heads[h].column(byte, tile * 8 + n);
              const int i = step * 16 + k;
              return column == nullptr || i >= width
                         ? 0.0
                         : (*column)[static_cast<std::size_t>(i)] * direction_scale;
            });
      const int num_steps = binary_steps_of(byte);
      const int first = 16 * kBinaryColumns * binary_steps_before(byte);
      for (int step = 0; step < num_steps; ++step)
        for (int tile = 0; tile < 2; ++tile)
          for (int lane = 0; lane < 32; ++lane)
            add_lane_operands(grams, lane, [&](int k, int n) {
              const int at = first + (tile * 8 + n) * 16 * num_steps + step * 16 + k;
              return all_grams[h][static_cast<std::size_t>(at)] * gram_scale;
            });
    }
}

}  // namespace commvq::cuda
