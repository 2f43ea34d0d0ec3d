# The container of one tenant: greenroom, Node and the Claude Code CLI on a slim Debian.
#
#   docker build -t greenroom .                      what most sites need
#   docker build -t greenroom:full --target full .   with git, python3, make, g++ and curl
#
# Three secrets may be lent to the build, and none stays in a layer: `ca` (certificates of the network
# that the build is in), `npmrc` and `cargo` (where packages come from). No `# syntax=` line: the
# engine's own BuildKit is enough, so nothing but the base images is fetched for the build itself.

# ---- greenroom, its dependencies in a layer of their own -------------------------------------------
FROM rust:1-bookworm AS build
WORKDIR /src
# Names of functions are of no use in production, and weigh 6 MB.
ENV CARGO_PROFILE_RELEASE_STRIP=symbols CARGO_INCREMENTAL=0 CARGO_TERM_COLOR=never
COPY Cargo.toml Cargo.lock ./
# A program of nothing: what is built here stays valid until Cargo.toml or Cargo.lock changes.
RUN --mount=type=secret,id=ca,target=/run/secrets/ca.pem,required=false \
    --mount=type=secret,id=cargo,target=/usr/local/cargo/config.toml,required=false \
    --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    if [ -s /run/secrets/ca.pem ]; then export CARGO_HTTP_CAINFO=/run/secrets/ca.pem; fi; \
    mkdir -p src tests/acting benches/bench \
    && touch src/lib.rs \
    && for main in src/main.rs tests/acting/claude.rs benches/bench/main.rs; do echo 'fn main() {}' > "$main"; done \
    && cargo build --release --locked --bin greenroom
COPY workspace-template workspace-template
COPY src src
RUN --mount=type=secret,id=ca,target=/run/secrets/ca.pem,required=false \
    --mount=type=secret,id=cargo,target=/usr/local/cargo/config.toml,required=false \
    --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    if [ -s /run/secrets/ca.pem ]; then export CARGO_HTTP_CAINFO=/run/secrets/ca.pem; fi; \
    find src -exec touch {} + \
    && cargo build --release --locked --bin greenroom \
    && install -D target/release/greenroom /out/usr/local/bin/greenroom

# ---- the CLI, pinned to the version that greenroom was tested with ---------------------------------
FROM node:22-bookworm-slim AS cli
COPY src/config/programs.rs /tmp/programs.rs
# The platform's package alone: no script of a package runs, and there is no second copy. It lies where
# greenroom looks first and PATH does not lead; `claude` on PATH is ours.
RUN --mount=type=secret,id=ca,target=/run/secrets/ca.pem,required=false \
    --mount=type=secret,id=npmrc,target=/root/.npmrc,required=false \
    if [ -s /run/secrets/ca.pem ]; then export NODE_EXTRA_CA_CERTS=/run/secrets/ca.pem; fi; \
    case "$(dpkg --print-architecture)" in amd64) arch=x64 ;; arm64) arch=arm64 ;; *) exit 1 ;; esac; \
    version="$(sed -n 's/^pub const TESTED_CLAUDE_VERSION.*"\(.*\)";$/\1/p' /tmp/programs.rs)"; \
    package="@anthropic-ai/claude-code-linux-$arch"; \
    folder="/out/usr/local/lib/node_modules/$package"; \
    mkdir -p "$folder" && cd "$folder" \
    && npm pack --silent "$package@$version" \
    && tar -xzf ./*.tgz --strip-components=1 && rm ./*.tgz \
    && chmod 755 claude

# ---- Node without its symbols, npm without its manual: 28 MB less ----------------------------------
FROM rust:1-bookworm AS node
COPY --from=node:22-bookworm-slim /usr/local/bin/node /out/usr/local/bin/node
COPY --from=node:22-bookworm-slim /usr/local/lib/node_modules/npm /out/usr/local/lib/node_modules/npm
RUN strip /out/usr/local/bin/node \
    && rm -rf /out/usr/local/lib/node_modules/npm/docs /out/usr/local/lib/node_modules/npm/man \
    && ln -s ../lib/node_modules/npm/bin/npm-cli.js /out/usr/local/bin/npm \
    && ln -s ../lib/node_modules/npm/bin/npx-cli.js /out/usr/local/bin/npx

# ---- everything that is ours, as one layer ---------------------------------------------------------
FROM debian:bookworm-slim AS ours
COPY --from=build /out /out
COPY scripts/entrypoint.sh scripts/health-check.sh scripts/workspace-init.sh scripts/auto-shutdown.sh /out/app/scripts/
# `claude`, `ccusage` and `monitor` are greenroom under other names.
RUN chmod 755 /out/app/scripts/*.sh \
    && for name in claude ccusage monitor; do ln -s greenroom "/out/usr/local/bin/$name"; done

# ---- what runs -------------------------------------------------------------------------------------
FROM debian:bookworm-slim AS base
# Folders that are written to. A volume takes owner and mode from here, also on Fargate. Home is nobody
# else's: in /tmp an agent could leave settings for a CLI that somebody starts in the container.
RUN groupadd --gid 1000 greenroom \
    && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /home/greenroom --shell /usr/sbin/nologin greenroom \
    && install -d -o 1000 -g 1000 -m 755 /workspace /var/cache/greenroom \
    && install -d -o 1000 -g 1000 -m 700 /home/greenroom
# Debian's list of authorities; its package would bring OpenSSL.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=node /out /
COPY --from=cli /out /
# Children reach npm's registry and nobody else, until the operator names the hosts that sites ask for.
ENV HOME=/home/greenroom \
    CACHE_PATH=/var/cache/greenroom \
    WORKSPACE_PATH=/workspace \
    EGRESS_ALLOW=none \
    DISABLE_AUTOUPDATER=1
WORKDIR /workspace
# With these a read-only root is enough. /workspace is none of them: work must not end up in a volume
# without a name because somebody forgot to mount the right one.
VOLUME ["/tmp", "/var/cache/greenroom", "/home/greenroom"]
EXPOSE 8080 4321 4322
STOPSIGNAL SIGTERM
# ECS reads its own task definition instead.
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 \
    CMD ["/usr/local/bin/greenroom", "health"]
ENTRYPOINT ["/usr/local/bin/greenroom"]
CMD ["serve"]

# ---- with the tools of sites that build native modules or depend on git repositories ---------------
FROM base AS full
RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3 make g++ curl \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
COPY --from=ours /out /
ARG VERSION=unknown REVISION=unknown CREATED=unknown
LABEL org.opencontainers.image.title="greenroom" \
      org.opencontainers.image.description="Lets customers edit their websites by talking (with build tools)" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="debian:bookworm-slim" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"
USER 1000:1000

# ---- the default -----------------------------------------------------------------------------------
FROM base
COPY --from=ours /out /
ARG VERSION=unknown REVISION=unknown CREATED=unknown
LABEL org.opencontainers.image.title="greenroom" \
      org.opencontainers.image.description="Lets customers edit their websites by talking" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="debian:bookworm-slim" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"
# Where the kernel has Landlock. Without it start as 0:0 with SETUID, SETGID, KILL, CHOWN, DAC_OVERRIDE
# and FOWNER alone (docs/operations.md): the program then gives each tenant's children a uid of their own.
USER 1000:1000
