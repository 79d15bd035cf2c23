#include "commvq/io/dlpack.hpp"

#include <array>
#include <cstring>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace commvq {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

/// A tensor [4][6] of 0, 1, ... whose fields a test changes.
struct Tensor {
  std::array<float, 64> elements;
  std::array<std::int64_t, 4> shape{4, 6, 1, 1};
  std::array<std::int64_t, 4> strides{6, 1, 1, 1};
  DLTensor dl{};

  Tensor() {
    for (std::size_t i = 0; i < elements.size(); ++i) elements[i] = static_cast<float>(i);
    dl.data = elements.data();
    dl.device.device_type = kDLCPU;
    dl.ndim = 2;
    dl.dtype.code = kDLFloat;
    dl.dtype.bits = 32;
    dl.dtype.lanes = 1;
    dl.shape = shape.data();
    dl.strides = strides.data();
  }
};

TEST(FromDlpack, ViewsRowsInPlace) {
  Tensor tensor;
  const auto view = from_dlpack<float>(tensor.dl);
  EXPECT_EQ(view.data, tensor.elements.data());
  EXPECT_EQ(view.rows, 4);
  EXPECT_EQ(view.cols, 6);
  EXPECT_EQ(view(2, 3), 15.0f);
  view(2, 3) = -1;
  EXPECT_EQ(tensor.elements[15], -1.0f);
}

TEST(FromDlpack, StridesAndByteOffset) {
  Tensor tensor;
  tensor.strides[0] = 10;
  tensor.dl.byte_offset = 8;
  const auto view = from_dlpack<const float>(tensor.dl);
  EXPECT_EQ(view.row_stride, 10);
  EXPECT_EQ(view(3, 5), 2.0f + 30 + 5);
  tensor.dl.strides = nullptr;  // compact
  EXPECT_EQ(from_dlpack<const float>(tensor.dl)(3, 5), 2.0f + 18 + 5);
}

TEST(FromDlpack, HeadsOfATokenBecomeOneRow) {
  Tensor tensor;
  tensor.dl.ndim = 3;
  tensor.shape = {3, 2, 4, 1};
  tensor.strides = {9, 4, 1, 1};
  const auto view = from_dlpack<const float>(tensor.dl);
  EXPECT_EQ(view.rows, 3);
  EXPECT_EQ(view.cols, 8);
  EXPECT_EQ(view(2, 7), 18.0f + 7);
  tensor.strides[1] = 3 * 4;  // [heads][tokens][head_dim], turned
  EXPECT_THAT([&] { from_dlpack<const float>(tensor.dl); },
              ThrowsMessage<Error>(AllOf(HasSubstr("axis 1"), HasSubstr("12"), HasSubstr("4"))));
}

TEST(FromDlpack, StridesOfAxesOfOneElementDoNotMatter) {
  Tensor tensor;
  tensor.shape[0] = 1;
  tensor.strides[0] = -77;
  EXPECT_EQ(from_dlpack<const float>(tensor.dl).row_stride, 6);
  tensor.shape = {4, 1, 1, 1};
  tensor.strides = {2, 99, 1, 1};
  EXPECT_EQ(from_dlpack<const float>(tensor.dl)(3, 0), 6.0f);
}

TEST(FromDlpack, NoTokensNeedNoData) {
  Tensor tensor;
  tensor.shape[0] = 0;
  tensor.dl.data = nullptr;
  const auto view = from_dlpack<const float>(tensor.dl);
  EXPECT_EQ(view.rows, 0);
  EXPECT_EQ(view.cols, 6);
}

TEST(FromDlpack, PinnedHostMemoryIsHostMemory) {
  Tensor tensor;
  tensor.dl.device.device_type = kDLCUDAHost;
  EXPECT_EQ(from_dlpack<const float>(tensor.dl).rows, 4);
}

TEST(FromDlpack, RefusesWhatDoesNotFitNamingIt) {
  const auto refuses = [](auto change, const char* part) {
    Tensor tensor;
    change(tensor);
    EXPECT_THAT([&] { from_dlpack<const float>(tensor.dl); },
                ThrowsMessage<Error>(HasSubstr(part)));
  };
  refuses([](Tensor& t) { t.dl.device.device_type = kDLCUDA; }, "device of type 2");
  refuses([](Tensor& t) { t.dl.device.device_type = kDLCUDAManaged; }, "device of type 13");
  refuses(
      [](Tensor& t) {
        const int unknown = 12345;  // more than the enumeration's bits
        std::memcpy(&t.dl.device.device_type, &unknown, sizeof unknown);
      },
      "device of type 12345");
  refuses([](Tensor& t) { t.dl.dtype.code = kDLInt; }, "type code 0");
  refuses([](Tensor& t) { t.dl.dtype.code = kDLBfloat; }, "type code 4");
  refuses([](Tensor& t) { t.dl.dtype.bits = 16; }, "16 bits");
  refuses([](Tensor& t) { t.dl.dtype.bits = 64; }, "64 bits");
  refuses([](Tensor& t) { t.dl.dtype.lanes = 4; }, "4 lanes");
  refuses([](Tensor& t) { t.dl.ndim = 1; }, "1 axes");
  refuses([](Tensor& t) { t.dl.ndim = 4; }, "4 axes");
  refuses([](Tensor& t) { t.dl.shape = nullptr; }, "no shape");
  refuses([](Tensor& t) { t.shape[0] = -1; }, "axis 0 of the DLPack tensor has -1");
  refuses([](Tensor& t) { t.shape[1] = 0; }, "axis 1 of the DLPack tensor has 0");
  refuses([](Tensor& t) { t.shape[1] = std::int64_t{1} << 62; }, "more elements than memory");
  refuses([](Tensor& t) { t.strides[1] = 2; }, "stride of 2");
  refuses([](Tensor& t) { t.strides[1] = -1; }, "stride of -1");
  refuses([](Tensor& t) { t.strides[0] = 5; }, "5 elements apart");
  refuses([](Tensor& t) { t.strides[0] = -6; }, "-6 elements apart");
  refuses([](Tensor& t) { t.strides[0] = std::int64_t{1} << 60; }, "more than can be addressed");
  refuses([](Tensor& t) { t.dl.data = nullptr; }, "data is null");
  refuses([](Tensor& t) { t.dl.byte_offset = 2; }, "byte_offset 2");
  refuses([](Tensor& t) { t.dl.data = reinterpret_cast<char*>(t.elements.data()) + 1; },
          "must be a multiple of 4");
}

TEST(ToDlpack, SharesElementsUntilTheDeleterRuns) {
  auto owner = std::make_shared<std::vector<float>>(40);
  for (std::size_t i = 0; i < 40; ++i) (*owner)[i] = static_cast<float>(i);
  const std::weak_ptr<std::vector<float>> alive = owner;
  DLManagedTensor* const tensor = to_dlpack({owner->data(), 4, 6, 10}, owner);
  owner.reset();
  ASSERT_FALSE(alive.expired());
  const auto view = from_dlpack<const float>(tensor->dl_tensor);  // there and back
  EXPECT_EQ(view.data, alive.lock()->data());
  EXPECT_EQ(view.rows, 4);
  EXPECT_EQ(view.cols, 6);
  EXPECT_EQ(view(3, 5), 35.0f);
  tensor->deleter(tensor);
  EXPECT_TRUE(alive.expired());
}

TEST(ToDlpack, RefusesWhatIsNoTensor) {
  float element = 0;
  EXPECT_THAT(
      [&] {
        to_dlpack({&element, 2, 6, 5}, nullptr);
      },
      ThrowsMessage<Error>(HasSubstr("5 elements apart")));
  EXPECT_THAT(
      [&] {
        to_dlpack({nullptr, 2, 6, 6}, nullptr);
      },
      ThrowsMessage<Error>(HasSubstr("null data")));
  EXPECT_THAT(
      [&] {
        to_dlpack({&element, -1, 1, 1}, nullptr);
      },
      ThrowsMessage<Error>(HasSubstr("[-1, 1]")));
}

}  // namespace
}  // namespace commvq
