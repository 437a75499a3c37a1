// The operators: each cuts a call into pieces for the pool and hands them to the instruction set in use.
#pragma once

#include <string>
#include <vector>

#include "isa.h"

namespace resq {

// The table in use; the fastest usable one until `use` says otherwise.
const Kernels& active();
// Throws std::invalid_argument for a name that is unknown or unusable here.
void use(const std::string& name);

void activate(const ActivationCall& call, int64_t rows, int threads);
// Linears that share one input run as one job.
void linears(const std::vector<LinearCall>& calls, int threads);
void float_linears(const std::vector<FloatLinearCall>& calls, int threads);
void dense(const DenseCall& call, int threads);
void rope_append(const RopeCall& call, int threads);
void attend(const AttendCall& call, int threads);

// Billions of integer operations (2 per multiply-add) a second, all threads together, on registers.
double integer_peak(int threads, double seconds);
// Bytes a second of reading `bytes` of memory once with all threads.
double read_bandwidth(const uint8_t* data, size_t bytes, int pattern, int threads);

}  // namespace resq
