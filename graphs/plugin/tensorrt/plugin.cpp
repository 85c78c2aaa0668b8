// Registers the operators in namespace `ivc` as soon as the library is loaded.
#if __has_include(<NvInferVersion.h>)
#include <NvInferVersion.h>
#endif

#if NV_TENSORRT_MAJOR >= 10
#include "shell_v3.h"
#elif NV_TENSORRT_MAJOR == 8 && NV_TENSORRT_MINOR >= 6 || NV_TENSORRT_MAJOR == 9
#include "shell_v2.h"
#else
#error "TensorRT 8.6 or later is needed"
#endif

#include "attention.h"
#include "joined.h"
#include "products.h"

namespace {

template <class Operator>
struct Registration {
    ivc::Creator<Operator> creator;
    Registration() { getPluginRegistry()->registerCreator(creator, ivc::kNamespace); }
};

Registration<ivc::SelectTokens> selectTokens;
Registration<ivc::CompactGatherN> compactGatherN;
Registration<ivc::AttendInPlace> attendInPlace;
Registration<ivc::EncodeAttend> encodeAttend;
Registration<ivc::CompactIntoCaches> compactIntoCaches;
Registration<ivc::TurnHeads> turnHeads;
Registration<ivc::AttendJoined> attendJoined;
Registration<ivc::FusedLinear> fusedLinear;
Registration<ivc::FusedLinearWide> fusedLinearWide;
Registration<ivc::FusedLinearInt4> fusedLinearInt4;

}  // namespace
