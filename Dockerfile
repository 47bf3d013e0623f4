# jobrunner's server, SDK and command line on Debian; docs/container.md has how it is run. Needs BuildKit.
#
#     docker build -t jobrunner .
#
# A host that reaches package registries through a mirror or an inspecting proxy gives its own files as build secrets, which no
# layer keeps:  --secret id=apt-sources,src=/etc/apt/sources.list.d/debian.sources  --secret id=pip-conf,src=/etc/pip.conf
#               --secret id=ca-certificates,src=/etc/ssl/certs/ca-certificates.crt

ARG BASE=debian:bookworm-slim

# What runs: Python, a pid 1 that reaps, and what compiles the filter of system calls. Half of tini's package is a second tini.
FROM ${BASE} AS runtime
RUN --mount=type=secret,id=apt-sources,target=/etc/apt/sources.list.d/debian.sources \
    apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 tini libseccomp2 >/dev/null \
    && rm -rf /usr/bin/tini-static /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/*

# What builds: the shim, which is linked statically and needs none of this later, the wheel, and the environment.
FROM runtime AS build
RUN --mount=type=secret,id=apt-sources,target=/etc/apt/sources.list.d/debian.sources \
    apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends gcc libc6-dev python3-venv >/dev/null
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /tools && python3 -m venv --without-pip /opt/jobrunner
WORKDIR /src
COPY pyproject.toml requirements.lock ./
COPY scripts/fetch_wheels.py scripts/
RUN --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca-certificates,target=/etc/ssl/certs/ca-certificates.crt \
    /tools/bin/python scripts/fetch_wheels.py /wheels \
    && /tools/bin/pip install --quiet --no-index --find-links /wheels hatchling
COPY . .
RUN /tools/bin/pip wheel --quiet --no-deps --no-index --no-build-isolation --wheel-dir /wheels . \
    && /tools/bin/pip --python /opt/jobrunner/bin/python install --quiet --no-index --find-links /wheels 'jobrunner[server,cli]'

FROM runtime
COPY --from=build /opt/jobrunner /opt/jobrunner
COPY dev-certs/make_certs.py docker/entrypoint docker/init-certs docker/health.py /opt/jobrunner/bin/
# In a container jobs cannot outlive the server, so it stops them when it is stopped, within the ten seconds that Docker gives.
ENV PATH=/opt/jobrunner/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    JOBRUNNERD_LISTEN=0.0.0.0:7443 \
    JOBRUNNERD_STATE_DIR=/var/lib/jobrunner \
    JOBRUNNERD_CA=/certs/ca.pem \
    JOBRUNNERD_CERT=/certs/server.pem \
    JOBRUNNERD_KEY=/certs/server.key \
    JOBRUNNERD_ON_SHUTDOWN=stop
EXPOSE 7443
# A volume, because limits of disk I/O need a disk to name, and the container's own layers show none.
VOLUME /var/lib/jobrunner
ENTRYPOINT ["entrypoint"]
CMD ["jobrunnerd", "serve"]
