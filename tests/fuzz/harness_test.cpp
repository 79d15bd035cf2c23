// The harnesses' own promises: what must end the process does.
#include "fuzz/harness.hpp"

#include <string>

#include <gtest/gtest.h>

namespace commvq::fuzz {
namespace {

TEST(Harness, AcceptsAndRejects) {
  EXPECT_TRUE(accepts(10, 1, [] {}));
  EXPECT_FALSE(accepts(10, 1, [] { fail("the value is ", 7); }));
}

TEST(HarnessDeathTest, OtherExceptionsEndTheProcess) {
  EXPECT_DEATH(accepts(10, 1, [] { throw std::length_error("too long"); }),
               "no commvq::Error: too long");
}

TEST(HarnessDeathTest, ReasonsMustBeReadable) {
  EXPECT_DEATH(accepts(10, 1, [] { throw Error(""); }), "without a reason");
  EXPECT_DEATH(accepts(10, 1, [] { throw Error("red \x1b[31m"); }), "control characters");
  EXPECT_DEATH(accepts(10, 1, [] { throw Error(std::string(3000, 'x')); }), "longer than");
}

TEST(HarnessDeathTest, MemoryBeyondTheMultipleEndsTheProcess) {
  if (!MemoryMeter::counts()) GTEST_SKIP() << "needs AddressSanitizer";
  const auto hold = [](std::size_t bytes) {
    return accepts(1000, 100, [&] {
      for (int repeat = 0; repeat < 3; ++repeat) ASSERT_EQ(std::string(bytes, 'x').back(), 'x');
    });
  };
  EXPECT_TRUE(hold(kFixedBytes + 1000 * 99));
  EXPECT_DEATH(hold(kFixedBytes + 1000 * 101), "bytes held at once");
}

}  // namespace
}  // namespace commvq::fuzz
