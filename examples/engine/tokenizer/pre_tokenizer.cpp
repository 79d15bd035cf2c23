#define PCRE2_CODE_UNIT_WIDTH 8
#include "engine/tokenizer/pre_tokenizer.hpp"

#include "commvq/core/error.hpp"

#include <pcre2.h>

#include "engine/json_file.hpp"
#include "engine/tokenizer/normalizer.hpp"

namespace engine {
namespace {

using commvq::require;

/// GPT-2's split, which ByteLevel applies where `use_regex` is true.
constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// Steps of one match, so that no pattern takes for ever; splitting patterns need a few a byte.
constexpr std::uint32_t kMaxMatchSteps = 1'000'000;

}  // namespace

void PreTokenizer::PatternDeleter::operator()(void* pattern) const {
  pcre2_code_free(static_cast<pcre2_code*>(pattern));
}

PreTokenizer::PreTokenizer(const Json& step) {
  if (!step.is_null()) add(step);
  require(!byte_level_ || metaspace_.empty(),
          "tokenizer.json: ByteLevel and Metaspace together are not supported");
}

void PreTokenizer::add(const Json& step) {
  const std::string type = text_of(step, "type");
  if (type == "Sequence") {
    for (const Json& part : list(step, "pretokenizers")) add(part);
  } else if (type == "Split") {
    require(pattern_ == nullptr, "tokenizer.json: more than one splitting step");
    require(text_of(step, "behavior") == "Isolated" && !flag(step, "invert", false),
            "tokenizer.json: Split with behavior ", shown(step["behavior"]),
            "; only Isolated, not inverted, is supported");
    compile(text_of(field(step, "pattern"), "Regex"));
  } else if (type == "ByteLevel") {
    byte_level_ = true;
    space_in_front_ = flag(step, "add_prefix_space", true);
    require(!space_in_front_ || pattern_ == nullptr,
            "tokenizer.json: ByteLevel with add_prefix_space after Split is not supported");
    if (flag(step, "use_regex", true)) {
      require(pattern_ == nullptr, "tokenizer.json: more than one splitting step");
      compile(kGpt2Pattern);
    }
  } else if (type == "Metaspace") {
    add_metaspace(step);
  } else {
    commvq::fail("tokenizer.json: pre-tokenizer \"", printable(type),
                 "\" is not supported; known are Sequence, Split, ByteLevel and Metaspace");
  }
}

void PreTokenizer::add_metaspace(const Json& step) {
  require(metaspace_.empty() && pattern_ == nullptr,
          "tokenizer.json: more than one splitting step");
  metaspace_ = text_of(step, "replacement");
  require(!metaspace_.empty(), "tokenizer.json: Metaspace has an empty replacement");
  cut_at_metaspace_ = flag(step, "split", true);
  // Files of older versions say add_prefix_space instead.
  if (is_absent(step, "prepend_scheme")) {
    prepend_ = flag(step, "add_prefix_space", true) ? Prepend::kAlways : Prepend::kNever;
    return;
  }
  const std::string scheme = text_of(step, "prepend_scheme");
  require(scheme == "always" || scheme == "first" || scheme == "never",
          "tokenizer.json: Metaspace has prepend_scheme \"", printable(scheme),
          "\"; known are always, first and never");
  prepend_ = scheme == "always"  ? Prepend::kAlways
             : scheme == "first" ? Prepend::kFirst
                                 : Prepend::kNever;
}

void PreTokenizer::compile(const std::string& pattern) {
  // \C matches a single byte, which would split characters.
  constexpr std::uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C;
  int code = 0;
  PCRE2_SIZE where = 0;
  pattern_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                               kOptions, &code, &where, nullptr));
  if (pattern_ != nullptr) {
    pcre2_jit_compile(static_cast<pcre2_code*>(pattern_.get()), PCRE2_JIT_COMPLETE);
    return;
  }
  PCRE2_UCHAR message[256];
  pcre2_get_error_message(code, message, sizeof message);
  commvq::fail("tokenizer.json: the splitting pattern is wrong at character ", where, ": ",
               reinterpret_cast<const char*>(message));
}

void PreTokenizer::split(std::string_view text, bool at_start,
                         const std::function<void(std::string_view)>& piece) const {
  if (text.empty()) return;
  if (!metaspace_.empty()) return split_by_space(text, at_start, piece);
  std::string with_space;
  if (space_in_front_ && text.front() != ' ') {
    with_space = " " + std::string(text);
    text = with_space;
  }
  if (pattern_ == nullptr) return piece(text);
  split_by_pattern(text, piece);
}

/// Matches of the pattern and what lies between them are pieces.
void PreTokenizer::split_by_pattern(std::string_view text,
                                    const std::function<void(std::string_view)>& piece) const {
  const auto* const pattern = static_cast<const pcre2_code*>(pattern_.get());
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(pattern, nullptr), &pcre2_match_data_free);
  const std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> limits(
      pcre2_match_context_create(nullptr), &pcre2_match_context_free);
  pcre2_set_match_limit(limits.get(), kMaxMatchSteps);
  const auto* const subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  std::size_t done = 0;
  while (done < text.size()) {
    const int result = pcre2_match(pattern, subject, text.size(), done, PCRE2_NO_UTF_CHECK,
                                   match.get(), limits.get());
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0) {
      PCRE2_UCHAR message[256];
      pcre2_get_error_message(result, message, sizeof message);
      commvq::fail("cannot split the text after byte ", done, ": ",
                   reinterpret_cast<const char*>(message));
    }
    const PCRE2_SIZE* const range = pcre2_get_ovector_pointer(match.get());
    require(range[1] > range[0], "tokenizer.json: the splitting pattern matches nothing at byte ",
            range[0], " of the text; it must match characters");
    if (range[0] > done) piece(text.substr(done, range[0] - done));
    piece(text.substr(range[0], range[1] - range[0]));
    done = range[1];
  }
  if (done < text.size()) piece(text.substr(done));
}

/// Every piece but perhaps the first begins with a space.
void PreTokenizer::split_by_space(std::string_view text, bool at_start,
                                  const std::function<void(std::string_view)>& piece) const {
  std::string spaced = replaced(text, " ", metaspace_);
  const bool wanted = prepend_ == Prepend::kAlways || (prepend_ == Prepend::kFirst && at_start);
  if (wanted && !spaced.starts_with(metaspace_)) spaced.insert(0, metaspace_);
  text = spaced;
  while (cut_at_metaspace_) {
    const std::size_t next =
        text.find(metaspace_, text.starts_with(metaspace_) ? metaspace_.size() : 0);
    if (next == std::string_view::npos) break;
    piece(text.substr(0, next));
    text.remove_prefix(next);
  }
  if (!text.empty()) piece(text);
}

}  // namespace engine
