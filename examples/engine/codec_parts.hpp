#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "commvq/io/codebook_file.hpp"

namespace engine {

/// Layers from `begin` up to `end`, which is not one of them.
struct LayerRange {
  int begin = 0, end = 0;

  /// Reads "A:B". Throws `commvq::Error` unless 0 <= A < B <= num_layers.
  static LayerRange parse(const std::string& text, int num_layers);
};

/// A codebook file that may lack layers: those have no codec.
struct CodecPart {
  std::filesystem::path path;
  commvq::ModelCodecs codecs;
};

/// Throws `commvq::Error` naming what differs, unless both parts belong to one calibration: the
/// same model, shape and provenance. Of provenances of words "name=value" it names those that
/// differ.
void require_same_calibration(const CodecPart& one, const CodecPart& other);

/// One file's codecs from parts that hold each layer once between them. Throws `commvq::Error` for
/// parts of different calibrations, and for a layer that two parts hold or none does.
commvq::ModelCodecs merge_parts(const std::vector<CodecPart>& parts);

/// The folder OUT.parts, where the finished layers of a calibration that writes OUT wait for the
/// others, so that an interrupted run can go on. Each is a codebook file that lacks the other
/// layers and appears at once, complete.
class PartsFolder {
 public:
  /// `whole` is what OUT will hold, of all layers, without codecs.
  PartsFolder(const std::filesystem::path& out, commvq::ModelCodecs whole);

  /// The codec of a layer, if it is there. Throws `commvq::Error` if it comes from another
  /// calibration.
  std::optional<commvq::LayerCodec> load(int layer) const;
  void save(int layer, const commvq::LayerCodec& codec) const;
  /// Removes the layers and, where it holds nothing else, the folder.
  void remove() const;

 private:
  std::filesystem::path path_of(int layer) const;

  std::filesystem::path folder_;
  commvq::ModelCodecs whole_;
};

}  // namespace engine
