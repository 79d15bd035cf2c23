#pragma once

#include "commvq/c_api.h"
#include "commvq/cache/cache.hpp"
#include "commvq/io/codebook_file.hpp"

/// What the opaque handles of the C interface point to.
struct commvq_codecs {
  commvq::ModelCodecs codecs;
};

struct commvq_cache {
  commvq::Cache cache;
};
