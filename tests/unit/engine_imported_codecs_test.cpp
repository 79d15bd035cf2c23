// Codebooks in the layout of the authors' release, after tools/import_commvq.py, against the
// formulas of the paper: see tests/data/make_commvq_release.py. The test import_commvq writes the
// file.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "commvq/io/codebook_file.hpp"
#include "commvq/io/safetensors.hpp"

#include <gmock/gmock.h>

#include "engine/model.hpp"
#include "reference/example_data.hpp"

namespace commvq {
namespace {

using testing_support::test_data;

std::vector<std::int64_t> integers(const TensorView& tensor) {
  std::vector<std::int64_t> values(static_cast<std::size_t>(tensor.num_elements()));
  EXPECT_EQ(tensor.dtype, Dtype::kI64);
  std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  return values;
}

class ImportedCodecs : public testing::TestWithParam<int> {
 protected:
  const std::string layer_ = std::to_string(GetParam());
  const SafetensorsFile expected_{test_data() / "commvq_release/expected.safetensors"};
  const ModelCodecs codecs_ = load_codecs(COMMVQ_IMPORTED_CODEBOOKS);

  /// `[tokens][32]`.
  std::vector<float> floats(const char* name) const {
    return expected_.at(name + ("." + layer_)).to_floats({24, 32});
  }
  void expect_near(const std::vector<float>& decoded, const std::vector<float>& expected) const {
    ASSERT_EQ(decoded.size(), expected.size());
    for (std::size_t i = 0; i < decoded.size(); ++i)
      ASSERT_NEAR(decoded[i], expected[i], 1e-5 * (1 + std::abs(expected[i]))) << "element " << i;
  }
};

TEST_P(ImportedCodecs, KeysHaveTheCodesAndValuesOfTheFormula) {
  const auto& keys = codecs_.layers[static_cast<std::size_t>(GetParam())].keys;
  ASSERT_EQ(keys->config().num_codes(), 6);
  std::vector<float> given = floats("keys"), decoded(given.size());
  std::vector<std::uint16_t> codes(24 * 12), norms(24);
  keys->encode({given.data(), 24, 32}, {codes.data(), 24, 12}, norms.data());
  EXPECT_EQ(std::vector<std::int64_t>(codes.begin(), codes.end()),
            integers(expected_.at("key_codes." + layer_)));
  keys->decode({codes.data(), 24, 12}, norms.data(), {decoded.data(), 24, 32});
  expect_near(decoded, floats("decoded_keys"));
}

TEST_P(ImportedCodecs, ValuesHaveTheCodesAndValuesOfTheFormula) {
  const auto& values = codecs_.layers[static_cast<std::size_t>(GetParam())].values;
  EXPECT_EQ(values->is_scaled(), GetParam() == 0);
  std::vector<float> given = floats("values"), decoded(given.size());
  std::vector<std::uint8_t> codes(24 * 4);
  std::vector<std::uint16_t> scales(24);
  values->encode({given.data(), 24, 32}, {codes.data(), 24, 4}, scales.data());
  std::vector<std::int64_t> bits;
  for (int i = 0; i < 24 * 32; ++i)
    bits.push_back(codes[static_cast<std::size_t>(i / 8)] >> (i % 8) & 1);
  EXPECT_EQ(bits, integers(expected_.at("value_bits." + layer_)));
  values->decode({codes.data(), 24, 4}, scales.data(), {decoded.data(), 24, 32});
  // The scale is rounded from another order of sums, which may move it by a step of bf16.
  const std::vector<float> expected = floats("decoded_values");
  for (std::size_t i = 0; i < decoded.size(); ++i)
    ASSERT_NEAR(decoded[i], expected[i], 0.004 * std::abs(expected[i]) + 1e-5) << "element " << i;
}

TEST(ImportedCodebooks, BelongToTheirModel) {
  const engine::Model model(test_data() / "checkpoints/llama3");
  const ModelCodecs codecs = load_codecs(COMMVQ_IMPORTED_CODEBOOKS);
  EXPECT_NO_THROW(codecs.require_model(model.config().rope, model.config().num_kv_heads,
                                       model.config().num_layers, model.digest()));
}

INSTANTIATE_TEST_SUITE_P(Layers, ImportedCodecs, testing::Values(0, 1));

}  // namespace
}  // namespace commvq
