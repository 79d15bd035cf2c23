#pragma once

/// Everything of the library for the CPU.
#include "commvq/attention/attention.hpp"
#include "commvq/cache/cache.hpp"
#include "commvq/core/bit_packing.hpp"
#include "commvq/core/error.hpp"
#include "commvq/core/float16.hpp"
#include "commvq/core/view.hpp"
#include "commvq/io/codebook_file.hpp"
#include "commvq/io/safetensors.hpp"
#include "commvq/key_codec/key_codec.hpp"
#include "commvq/learner/key_learner.hpp"
#include "commvq/learner/query_statistics.hpp"
#include "commvq/learner/value_trainer.hpp"
#include "commvq/rope/rope.hpp"
#include "commvq/value_codec/value_codec.hpp"
