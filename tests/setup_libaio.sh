#!/bin/sh
# Installs libaio, which the tests of ds_configs/zero3_nvme.json need and otherwise skip, and lets PYTHON compile what uses
# it, before tests wait for that: so nothing here may fail or hang.
there() {
    printf '#include <libaio.h>\nint main(void) { return 0; }\n' | c++ -x c++ - -laio -o /dev/null 2> /dev/null
}

if ! there && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "installing libaio-dev for the NVMe tests"
    timeout 300 sh -c 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y libaio-dev' > /dev/null 2>&1
fi
there && PYTHONPATH=$(dirname "$0") "$1" -c 'import nvme; nvme.missing()' > /dev/null 2>&1
there || echo "no libaio (Debian: libaio-dev) or no C++ compiler: the NVMe tests will be skipped"
exit 0
