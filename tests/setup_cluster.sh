#!/bin/sh
# Installs what the tests on several nodes and on Slurm need and otherwise skip: so nothing here may fail or hang.
PATH=$PATH:/usr/sbin:/sbin

missing() {
    while read -r program package; do
        command -v "$program" > /dev/null || printf '%s ' "$package"
    done << END
sshd openssh-server
ssh openssh-client
pdsh pdsh
ip iproute2
slurmctld slurm-wlm
munged munge
END
}

if [ -n "$(missing)" ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "installing $(missing)for the tests on several nodes"
    # Its services are not started: with this policy Debian's packages leave that to the tests.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d && ours=yes
    fi
    # shellcheck disable=SC2046
    timeout 300 env DEBIAN_FRONTEND=noninteractive sh -c \
        'apt-get update && apt-get install -y --no-install-recommends "$@"' apt $(missing) < /dev/null > /dev/null 2>&1
    [ -z "$ours" ] || rm -f /usr/sbin/policy-rc.d
fi
[ -z "$(missing)" ] || echo "not installed (Debian's names): $(missing): the tests that need it will be skipped"
exit 0
