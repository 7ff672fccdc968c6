#!/bin/sh
# What the test of ds_configs/zero3_nvme.json needs: libaio, and DeepSpeed's async_io compiled with it. Without libaio
# that test is skipped, so nothing here may fail. Usage: tests/setup_libaio.sh PYTHON
there() {
    printf '#include <libaio.h>\nint main(void) { return 0; }\n' | c++ -x c++ - -laio -o /dev/null 2> /dev/null
}

if ! there && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "installing libaio-dev for the NVMe test"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y libaio-dev; } > /dev/null 2>&1
fi
if there; then
    echo "DeepSpeed's async_io for the NVMe test: compiled once a machine, which takes some minutes"
    DS_ACCELERATOR=cpu "$1" -c "from deepspeed.ops.op_builder import AsyncIOBuilder as B; B().load(verbose=False)" \
        > /dev/null 2>&1
else
    echo "no libaio (Debian: libaio-dev) or no C++ compiler: the NVMe test will be skipped"
fi
exit 0
