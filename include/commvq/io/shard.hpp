#pragma once

#include "commvq/core/export.h"
#include "commvq/io/codebook_file.hpp"

namespace commvq {

/// The codecs of rank `rank` of `num_ranks` that share the KV heads of every layer, as tensor
/// parallel engines do: rank r has the num_kv_heads / num_ranks heads from r * num_kv_heads /
/// num_ranks on. The codes of a head, and attention over them, are those of `codecs`.
///
/// Throws `Error` unless num_ranks divides num_kv_heads and rank is in [0, num_ranks); with more
/// than one rank also for codecs that couple heads of different ranks: key codecs with one norm a
/// token over all heads, and value codecs whose num_blocks is no multiple of num_ranks. Learn value
/// codecs in blocks (the example calibrate: `--value-blocks N`), or all codecs for each rank on its
/// own heads (`--ranks N --rank R`).
COMMVQ_API ModelCodecs shard(const ModelCodecs& codecs, int rank, int num_ranks);

}  // namespace commvq
