# The consumer as a container: docker build -t nexus-export .
FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements/ requirements/
RUN python -m venv /opt/nexus-export \
 && /opt/nexus-export/bin/pip install --require-hashes -r requirements/run.txt \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes -r requirements/dev.txt
COPY pyproject.toml README.md LICENSE ./
COPY consumer/ consumer/
COPY nexus_export/ nexus_export/
COPY migrations/ migrations/
RUN /opt/build/bin/hatchling build -t wheel -d /dist \
 && /opt/nexus-export/bin/pip install --no-deps /dist/*.whl

FROM python:3.11.13-slim-bookworm
# A fixed number, so that folders outside can be given to it; compose may choose another one.
RUN useradd --uid 10001 --no-create-home --home-dir /var/lib/nexus-export --shell /usr/sbin/nologin nexus \
 && install -d -o nexus -g nexus /var/lib/nexus-export
COPY --from=build /opt/nexus-export /opt/nexus-export
ENV PATH=/opt/nexus-export/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /var/lib/nexus-export
USER 10001:10001
HEALTHCHECK --interval=60s --timeout=20s --start-period=30s --retries=3 CMD ["nexus-export", "status"]
ENTRYPOINT ["nexus-export"]
CMD ["run"]
