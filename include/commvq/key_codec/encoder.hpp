#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "commvq/core/parallel_errors.hpp"
#include "commvq/core/view.hpp"
#include "commvq/key_codec/codebook.hpp"

#include <Eigen/Core>

namespace commvq {

/// Finds the codes of keys of one head: beam search over the residual stages. With a beam of one it
/// is the paper's greedy encoder: per stage the best of the Nc^2 centres (CommVQ, section 3.3).
/// Immutable after construction; any number of threads may encode at once.
template <class Scalar>
class KeyEncoder {
 public:
  /// Precomputes per stage the inner products of book A with book B. Copies the codebook. Throws
  /// `Error` for rows that do not fit the configuration, for weights that are not in (0, 1e9], and
  /// for rows so long that squares of residuals would overflow: the norms of the longest row of
  /// every book of a group, with weights, may add up to 1e18.
  explicit KeyEncoder(KeyCodebook<Scalar> codebook);

  const KeyCodebook<Scalar>& codebook() const { return codebook_; }

  /// Encodes `keys` `[tokens][head_dim]`, planar and already divided by the norm. `codes` is
  /// `[tokens][num_codes()]`. Minimises |key - decoded|^2, with the codebook's weights, among the
  /// `beam_width` candidates kept after each stage; ties go to the smaller (candidate, A, B).
  /// `squared_error`, `[tokens]` or null, receives what remains. Over many keys a wider beam leaves
  /// a smaller error; a single key can come out worse. Parallel over tokens where the caller is not
  /// in a parallel region. Throws `Error` for shapes that do not fit and for keys that are not
  /// finite or beyond 1e9.
  void encode(MatrixView<const Scalar> keys, int beam_width, MatrixView<std::uint16_t> codes,
              Scalar* squared_error = nullptr) const;

 private:
  using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using ConstMatrixMap = Eigen::Map<const Matrix>;

  /// One way to extend a candidate: centre Z_0[a] + Z_1[b].
  struct Choice {
    Scalar error;
    int candidate;
    std::uint16_t a;
    std::uint16_t b;

    /// The better of two comes first, of equally good ones the smaller (candidate, A, B).
    bool operator<(const Choice& other) const {
      return std::tie(error, candidate, a, b) <
             std::tie(other.error, other.candidate, other.a, other.b);
    }
  };
  /// Scratch memory of the search for the best extensions of one token's candidates.
  struct Search {
    using Row = Eigen::Matrix<Scalar, 1, Eigen::Dynamic>;

    Matrix parts;            ///< [width][2 * codebook_size]: of an error, what depends on A, on B
    Matrix least;            ///< [width][codebook_size]: the least error with each B
    Row of_columns, sorted;  ///< [codebook_size]: the least of all candidates
    std::vector<Choice> best;
  };
  /// The candidates of a block of tokens within one group, `width` of them a token.
  struct Beam {
    int width = 1;
    Matrix residuals;                  ///< [tokens * width][2g]
    std::vector<Scalar> errors;        ///< [tokens * width]
    std::vector<std::uint16_t> codes;  ///< [tokens * width][num_stages][2]
  };

  /// Tokens that go through the search together; of few tokens fewer, so that all threads have
  /// some.
  static constexpr Index kBlockTokens = 64;
  static constexpr Index kSmallBlockTokens = 8;
  // Within these limits no square overflows a float.
  static constexpr double kMaxKey = 1e9;
  static constexpr double kMaxWeight = 1e9;
  static constexpr double kMaxNormSum = 1e18;

  void check_norms() const;

  std::size_t stage_index(int group, int stage) const {
    return static_cast<std::size_t>(group) * codebook_.config.num_stages + stage;
  }
  /// Both books of a stage with weights applied, `[2 * codebook_size][2g]`.
  ConstMatrixMap books(int group, int stage) const {
    const std::size_t first = codebook_.book(group, stage, 0) - codebook_.rows.data();
    const std::vector<Scalar>& rows = weighted_rows_.empty() ? codebook_.rows : weighted_rows_;
    return {rows.data() + first, 2 * codebook_.config.codebook_size, codebook_.row_size()};
  }
  void encode_block(MatrixView<const Scalar> keys, int beam_width,
                    MatrixView<std::uint16_t> codes, Scalar* squared_error) const;
  Beam first_beam(MatrixView<const Scalar> keys, int group) const;
  void extend(Beam& beam, int group, int stage, int beam_width) const;
  void best_choices(const Beam& beam, const Matrix& products, Index token, int group, int stage,
                    std::size_t limit, Search& search) const;
  static void least_of_columns(const ConstMatrixMap& cross, const Scalar* part_a, Scalar* least);

  KeyCodebook<Scalar> codebook_;
  std::vector<Scalar> weighted_rows_;  ///< as the codebook's; empty without weights
  std::vector<Scalar> squared_norms_;  ///< [groups][stages][2 * codebook_size]
  std::vector<Scalar> cross_terms_;    ///< [groups][stages][A][B]: 2 <Z_0[A], Z_1[B]>
};

template <class Scalar>
KeyEncoder<Scalar>::KeyEncoder(KeyCodebook<Scalar> codebook) : codebook_(std::move(codebook)) {
  const KeyCodecConfig& config = codebook_.config;
  config.validate();
  const int size = config.codebook_size;
  const std::size_t stages = stage_index(config.num_groups(), 0);
  require(codebook_.rows.size() == stages * 2 * size * codebook_.row_size(), "the codebook holds ",
          codebook_.rows.size(), " numbers; its configuration needs ",
          stages * 2 * size * codebook_.row_size());
  const std::vector<Scalar>& weights = codebook_.pair_weights;
  if (!weights.empty()) {
    require(weights.size() == static_cast<std::size_t>(config.pairs.num_pairs()), "there are ",
            weights.size(), " pair weights; a head has ", config.pairs.num_pairs(), " pairs");
    for (std::size_t i = 0; i < weights.size(); ++i)
      require(weights[i] > 0 && weights[i] <= kMaxWeight, "pair weight ", i, " is ", weights[i],
              "; it must be positive and at most ", kMaxWeight);
    weighted_rows_ = codebook_.scaled_rows(weights);
  }
  squared_norms_.resize(stages * 2 * size);
  cross_terms_.resize(stages * size * size);
  for (int group = 0; group < config.num_groups(); ++group)
    for (int stage = 0; stage < config.num_stages; ++stage) {
      const ConstMatrixMap both = books(group, stage);
      const std::size_t at = stage_index(group, stage);
      Eigen::Map<Eigen::Matrix<Scalar, Eigen::Dynamic, 1>>(&squared_norms_[at * 2 * size],
                                                           2 * size) = both.rowwise().squaredNorm();
      Eigen::Map<Matrix>(&cross_terms_[at * size * size], size, size).noalias() =
          Scalar(2) * both.topRows(size) * both.bottomRows(size).transpose();
    }
  check_norms();
}

/// Throws unless a key of norm 1 less any rows has a square that can be computed.
template <class Scalar>
void KeyEncoder<Scalar>::check_norms() const {
  const KeyCodecConfig& config = codebook_.config;
  auto norms = squared_norms_.begin();
  for (int group = 0; group < config.num_groups(); ++group) {
    double sum = 0;
    for (int book = 0; book < 2 * config.num_stages; ++book, norms += config.codebook_size)
      sum += std::sqrt(double{*std::max_element(norms, norms + config.codebook_size)});
    require(sum <= kMaxNormSum, "the longest rows of the books of group ", group,
            " have norms that add up to ", sum, "; the limit is ", kMaxNormSum);
  }
}

template <class Scalar>
void KeyEncoder<Scalar>::encode(MatrixView<const Scalar> keys, int beam_width,
                                MatrixView<std::uint16_t> codes, Scalar* squared_error) const {
  const KeyCodecConfig& config = codebook_.config;
  require(keys.cols == config.pairs.head_dim, "the keys have ", keys.cols,
          " channels; the codebook is for ", config.pairs.head_dim);
  require(codes.rows == keys.rows && codes.cols == config.num_codes(), "codes are [", codes.rows,
          ", ", codes.cols, "]; these keys need [", keys.rows, ", ", config.num_codes(), "]");
  require(beam_width >= 1 && beam_width <= 1024, "beam_width is ", beam_width,
          "; it must be in [1, 1024]");
  for (Index t = 0; t < keys.rows; ++t)
    for (Index i = 0; i < keys.cols; ++i)
      if (!(std::abs(keys(t, i)) <= kMaxKey))
        fail("key ", t, ", planar channel ", i, " is ", keys(t, i),
             "; keys must be divided by their norm first");
  const Index block_tokens = keys.rows > kBlockTokens ? kBlockTokens : kSmallBlockTokens;
  const Index num_blocks = (keys.rows + block_tokens - 1) / block_tokens;
  ParallelErrors errors;
#pragma omp parallel for schedule(dynamic) if (num_blocks > 1)
  for (Index block = 0; block < num_blocks; ++block) {
    const Index first = block * block_tokens;
    const Index count = std::min(block_tokens, keys.rows - first);
    errors.guard([&] {
      encode_block(keys.middle_rows(first, count), beam_width, codes.middle_rows(first, count),
                   squared_error == nullptr ? nullptr : squared_error + first);
    });
  }
  errors.rethrow();
}

/// `encode` for the tokens that go through the search together.
template <class Scalar>
void KeyEncoder<Scalar>::encode_block(MatrixView<const Scalar> keys, int beam_width,
                                      MatrixView<std::uint16_t> codes,
                                      Scalar* squared_error) const {
  const KeyCodecConfig& config = codebook_.config;
  if (squared_error != nullptr) std::fill_n(squared_error, keys.rows, Scalar(0));
  for (int group = 0; group < config.num_groups(); ++group) {
    Beam beam = first_beam(keys, group);
    for (int stage = 0; stage < config.num_stages; ++stage) extend(beam, group, stage, beam_width);
    const Index path = Index{2} * config.num_stages;
    for (Index t = 0; t < keys.rows; ++t) {  // candidates are sorted: the first is the best
      const Index best = t * beam.width;
      std::copy_n(&beam.codes[static_cast<std::size_t>(best * path)], path,
                  codes.row(t) + group * path);
      if (squared_error != nullptr) squared_error[t] += beam.residuals.row(best).squaredNorm();
    }
  }
}

template <class Scalar>
auto KeyEncoder<Scalar>::first_beam(MatrixView<const Scalar> keys, int group) const -> Beam {
  const int g = codebook_.config.group_pairs;
  const Index num_pairs = keys.cols / 2;
  Beam beam;
  beam.residuals.resize(keys.rows, 2 * g);
  const std::vector<Scalar>& weights = codebook_.pair_weights;
  for (Index t = 0; t < keys.rows; ++t)
    for (Index part = 0; part < 2; ++part) {
      Scalar* const residual = beam.residuals.row(t).data() + part * g;
      std::copy_n(keys.row(t) + part * num_pairs + group * g, g, residual);
      if (weights.empty()) continue;
      for (int i = 0; i < g; ++i) residual[i] *= weights[static_cast<std::size_t>(group * g + i)];
    }
  beam.errors.resize(static_cast<std::size_t>(keys.rows));
  for (Index t = 0; t < keys.rows; ++t)
    beam.errors[static_cast<std::size_t>(t)] = beam.residuals.row(t).squaredNorm();
  beam.codes.resize(static_cast<std::size_t>(keys.rows) * 2 * codebook_.config.num_stages);
  return beam;
}

/// Replaces the candidates of every token by the best `beam_width` of all their extensions.
template <class Scalar>
void KeyEncoder<Scalar>::extend(Beam& beam, int group, int stage, int beam_width) const {
  const Index size = codebook_.config.codebook_size;
  const ConstMatrixMap both = books(group, stage);
  const Matrix products = beam.residuals * both.transpose();
  const Index tokens = beam.residuals.rows() / beam.width;
  const Index width = std::min<Index>(beam_width, beam.width * size * size);
  const Index path = Index{2} * codebook_.config.num_stages;

  Beam next;
  next.width = static_cast<int>(width);
  next.residuals.resize(tokens * width, both.cols());
  next.errors.resize(static_cast<std::size_t>(tokens * width));
  next.codes.resize(static_cast<std::size_t>(tokens * width * path));
  Search search;
  for (Index t = 0; t < tokens; ++t) {
    best_choices(beam, products, t, group, stage, static_cast<std::size_t>(width), search);
    for (Index i = 0; i < width; ++i) {
      const Choice& choice = search.best[static_cast<std::size_t>(i)];
      const Index from = t * beam.width + choice.candidate;
      const Index to = t * width + i;
      next.residuals.row(to) =
          beam.residuals.row(from) - both.row(choice.a) - both.row(size + choice.b);
      next.errors[static_cast<std::size_t>(to)] = choice.error;
      std::uint16_t* const codes = &next.codes[static_cast<std::size_t>(to * path)];
      std::copy_n(&beam.codes[static_cast<std::size_t>(from * path)], 2 * stage, codes);
      codes[2 * stage] = choice.a;
      codes[2 * stage + 1] = choice.b;
    }
  }
  beam = std::move(next);
}

/// The `limit` smallest errors |r - Z_0[a] - Z_1[b]|^2, sorted, over all candidates r of a token:
///     (|r|^2 + |Z_1[b]|^2 - 2 <r, Z_1[b]>) + ((|Z_0[a]|^2 - 2 <r, Z_0[a]>) + 2 <Z_0[a], Z_1[b]>).
/// First the least error of each (r, b): most of them exceed `limit` others, and need no closer look.
template <class Scalar>
void KeyEncoder<Scalar>::best_choices(const Beam& beam, const Matrix& products, Index token,
                                      int group, int stage, std::size_t limit,
                                      Search& search) const {
  const Index size = codebook_.config.codebook_size;
  const std::size_t at = stage_index(group, stage);
  const Scalar* const norms = &squared_norms_[at * 2 * size];
  const ConstMatrixMap cross(&cross_terms_[at * size * size], size, size);
  const auto row_of = [&](Index candidate) { return token * beam.width + candidate; };
  search.parts.resize(beam.width, 2 * size);
  search.least.resize(beam.width, size);
  for (Index candidate = 0; candidate < beam.width; ++candidate) {
    auto parts = search.parts.row(candidate).array();
    parts = Eigen::Map<const Eigen::Array<Scalar, 1, Eigen::Dynamic>>(norms, 2 * size) -
            2 * products.row(row_of(candidate)).array();
    parts.tail(size) += beam.errors[static_cast<std::size_t>(row_of(candidate))];
    least_of_columns(cross, parts.data(), search.least.row(candidate).data());
    search.least.row(candidate) += parts.tail(size).matrix();
  }

  // Columns that do not exceed `bound` hold at least `limit` extensions that do not.
  Scalar bound = std::numeric_limits<Scalar>::max();
  search.of_columns = search.least.row(0);
  for (Index candidate = 1; candidate < beam.width; ++candidate)
    search.of_columns = search.of_columns.cwiseMin(search.least.row(candidate));
  if (limit <= static_cast<std::size_t>(size)) {
    search.sorted = search.of_columns;
    Scalar* const sorted = search.sorted.data();
    std::nth_element(sorted, sorted + limit - 1, sorted + size);
    bound = sorted[limit - 1];
  }
  search.best.clear();
  for (Index b = 0; b < size; ++b) {
    if (search.of_columns[b] > bound) continue;
    for (Index candidate = 0; candidate < beam.width; ++candidate) {
      if (search.least(candidate, b) > bound) continue;
      const Scalar* const part_a = search.parts.row(candidate).data();
      const Scalar part_b = part_a[size + b];
      const Scalar* const column = cross.data() + b;
      for (Index a = 0; a < size; ++a) {
        const Scalar error = part_b + (part_a[a] + column[a * size]);
        if (error <= bound)
          search.best.push_back({error, static_cast<int>(candidate), static_cast<std::uint16_t>(a),
                                 static_cast<std::uint16_t>(b)});
      }
    }
  }
  const auto middle = search.best.begin() + static_cast<std::ptrdiff_t>(limit);
  std::partial_sort(search.best.begin(), middle, search.best.end());
}

/// The least part_a[a] + cross(a, b) of every b.
template <class Scalar>
void KeyEncoder<Scalar>::least_of_columns(const ConstMatrixMap& cross, const Scalar* part_a,
                                          Scalar* least) {
  constexpr Index kColumns = 64;  // few enough to stay in registers
  const Index size = cross.rows();
  for (Index first = 0; first < size; first += kColumns) {
    const Index count = std::min(kColumns, size - first);
    const auto extend_by = [&](auto columns) {
      constexpr int kFixed = decltype(columns)::value;
      using Row = Eigen::Array<Scalar, 1, kFixed>;
      Row least_here = Row::Constant(count, std::numeric_limits<Scalar>::max());
      for (Index a = 0; a < size; ++a)
        least_here = least_here.min(
            part_a[a] + Eigen::Map<const Row>(cross.row(a).data() + first, count));
      Eigen::Map<Row>(least + first, count) = least_here;
    };
    if (count == kColumns)
      extend_by(std::integral_constant<int, kColumns>());
    else
      extend_by(std::integral_constant<int, Eigen::Dynamic>());
  }
}

}  // namespace commvq
