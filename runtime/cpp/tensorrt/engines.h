// A device over a bundle's engines, whatever runs them.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "gpu.h"
#include "ivc/bundle.h"
#include "ivc/device.h"
#include "record.h"

namespace ivc {

using Engines = std::map<std::string, std::unique_ptr<Engine>>;  // by their graphs' names

// Throws where engines are not the bundle's, or do not fit each other. graph: whether a decode step is captured.
std::unique_ptr<Device> makeEnginesDevice(const Bundle& bundle, const EngineRecord& record, std::unique_ptr<Gpu> gpu,
    Engines engines, bool graph);

}  // namespace ivc
