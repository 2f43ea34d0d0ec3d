# shellcheck shell=bash
# What scripts/dev and scripts/test need besides cargo and npm: Node and the Claude Code CLI, each
# in a folder of its own below the cache. The system's own are never touched. Sourced from the
# project's folder.

# Brought where the system has no Node that Astro runs on. npm comes along, since Debian's own
# looks for its parts where only Debian's Node finds them.
NODE_VERSION=22.23.3
NPM_VERSION=10.9.9
MIN_NODE_VERSION=22.12.0
# What the program itself expects, so that there is one place for it.
CLAUDE_VERSION="$(sed -n 's/^pub const TESTED_CLAUDE_VERSION.*"\(.*\)";$/\1/p' src/config/programs.rs)"

# The public tool that our reports are compared with, for tests alone.
CCUSAGE_VERSION=20.0.20

# Two WebSocket peers that know nothing of each other, for tests alone.
WS_VERSION=8.23.0
WEBSOCKETS_VERSION=17.4

# The package managers besides npm that sites are locked with, for tests alone: the majors that the
# program fetches (src/workspace/dependencies/manifest.rs).
PNPM_VERSION=10.34.8
YARN_VERSION=1.22.22

# Beside the program's own cache, whose folders are named by clients.
GREENROOM_CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/greenroom-dev"
# Root runs agents as other users, who have to reach the tools, also in tests.
if [ "$(id -u)" = 0 ] && [ -z "${XDG_CACHE_HOME:-}" ] && [ $((8#$(stat -c %a "$HOME") & 1)) = 0 ]; then
  GREENROOM_CACHE=/var/cache/greenroom-dev
fi
TOOLS="$GREENROOM_CACHE/tools"
# Outside of the project: builds stay when a checkout goes, and searches don't walk through them.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$GREENROOM_CACHE/target}"

say() {
  printf '\n==> %s\n' "$*"
}

die() {
  printf 'greenroom: %s\n' "$*" >&2
  exit 1
}

has() {
  command -v "$1" >/dev/null 2>&1
}

# at_least FOUND WANTED: is this version that one or newer?
at_least() {
  [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

# Says in one line what to install, if something is missing.
check_system() {
  local rust found
  has cargo || die "cargo is missing: install Rust with rustup, see https://rustup.rs"
  rust="$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)"
  found="$(cargo --version | cut -d ' ' -f 2)"
  at_least "$found" "$rust" ||
    die "cargo $found is too old: Rust $rust or newer is needed; install it with rustup, see https://rustup.rs"
  has cc || die "a C compiler is missing: apt-get install build-essential"
  has npm || die "npm is missing: apt-get install npm"
}

# patiently COMMAND...: runs it, with a sign of life where it says nothing for long.
patiently() {
  local started=$SECONDS status=0 ticker
  # Its sleep holds none of our streams, so that nobody waits for it.
  while sleep 10 >/dev/null 2>&1; do echo "    ... $((SECONDS - started)) s"; done &
  ticker=$!
  "$@" || status=$?
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  return "$status"
}

# install FOLDER PACKAGE...: npm packages into a folder below $TOOLS, which is there whole or not
# at all. No script of a package runs.
install_packages() {
  local folder="$TOOLS/$1" new
  shift
  mkdir -p "$TOOLS"
  new="$(mktemp -d "$TOOLS/.new-XXXXXX")"
  chmod 755 "$new"
  if ! patiently npm install --global --prefix "$new" --ignore-scripts --no-audit --no-fund \
    --no-update-notifier --loglevel warn "$@"; then
    rm -rf "$new"
    die "npm could not install $*: its words are above"
  fi
  finish_packages "$new"
  # Another one of us may have been quicker; then its folder is as good.
  mv -T "$new" "$folder" 2>/dev/null || rm -rf "$new"
}

# npm links what packages declare as their programs; the platform package of Node declares none.
finish_packages() {
  local node
  node="$(find "$1/lib/node_modules" -path '*/node-linux-*/bin/node' -print -quit)"
  if [ -n "$node" ]; then
    mkdir -p "$1/bin"
    ln -sf "..${node#"$1"}" "$1/bin/node"
  fi
}

# Puts the public usage reporter into CCUSAGE_BIN, for the tests.
bring_websocket_peers() {
  local folder="websocket-peers-$WS_VERSION-$WEBSOCKETS_VERSION" new
  if [ -z "${WEBSOCKET_PEERS:-}" ]; then
    if [ ! -d "$TOOLS/$folder" ]; then
      say "Fetching ws $WS_VERSION and websockets $WEBSOCKETS_VERSION (under 1 MB, once)"
      mkdir -p "$TOOLS"
      new="$(mktemp -d "$TOOLS/.new-XXXXXX")"
      chmod 755 "$new"
      if ! patiently npm install --prefix "$new" --ignore-scripts --no-audit --no-fund \
        --no-update-notifier --loglevel warn "ws@$WS_VERSION" ||
        ! patiently python3 -m pip install --quiet --disable-pip-version-check \
          --root-user-action ignore --target "$new/python" "websockets==$WEBSOCKETS_VERSION"; then
        rm -rf "$new"
        die "the WebSocket peers could not be installed: the words above say why"
      fi
      mv -T "$new" "$TOOLS/$folder" 2>/dev/null || rm -rf "$new"
    fi
    WEBSOCKET_PEERS="$TOOLS/$folder"
  fi
  export WEBSOCKET_PEERS
}

# Puts pnpm and yarn into PACKAGE_MANAGERS, as the program keeps them among a user's downloads.
bring_package_managers() {
  local folder="package-managers-$PNPM_VERSION-$YARN_VERSION" new
  if [ -z "${PACKAGE_MANAGERS:-}" ]; then
    if [ ! -d "$TOOLS/$folder" ]; then
      say "Fetching pnpm $PNPM_VERSION and yarn $YARN_VERSION (about 6 MB, once)"
      mkdir -p "$TOOLS"
      new="$(mktemp -d "$TOOLS/.new-XXXXXX")"
      chmod 755 "$new"
      if ! patiently npm install --prefix "$new" --no-save --ignore-scripts --no-audit --no-fund \
        --no-update-notifier --loglevel warn "pnpm@$PNPM_VERSION" "yarn@$YARN_VERSION"; then
        rm -rf "$new"
        die "pnpm and yarn could not be installed: npm's words are above"
      fi
      mv -T "$new" "$TOOLS/$folder" 2>/dev/null || rm -rf "$new"
    fi
    PACKAGE_MANAGERS="$TOOLS/$folder"
  fi
  export PACKAGE_MANAGERS
}

bring_ccusage() {
  local arch folder
  if [ -z "${CCUSAGE_BIN:-}" ]; then
    case "$(uname -m)" in
      x86_64) arch=x64 ;;
      aarch64) arch=arm64 ;;
      *) die "there is no ccusage for $(uname -m)" ;;
    esac
    folder="ccusage-$CCUSAGE_VERSION-$arch"
    if [ ! -d "$TOOLS/$folder" ]; then
      say "Fetching ccusage $CCUSAGE_VERSION (about 2 MB, once)"
      install_packages "$folder" "@ccusage/ccusage-linux-$arch@$CCUSAGE_VERSION"
    fi
    CCUSAGE_BIN="$TOOLS/$folder/lib/node_modules/@ccusage/ccusage-linux-$arch/bin/ccusage"
    # Its main package's script would do that.
    chmod +x "$CCUSAGE_BIN"
  fi
  export CCUSAGE_BIN
}

# Puts Node on PATH and the CLI into CLAUDE_BIN, for the program and its tests.
bring_tools() {
  local arch libc="" claude_folder package found
  case "$(uname -m)" in
    x86_64) arch=x64 ;;
    aarch64) arch=arm64 ;;
    *) die "there is no Claude Code CLI for $(uname -m)" ;;
  esac
  if compgen -G '/lib/ld-musl-*' >/dev/null; then libc=-musl; fi
  [ -n "$CLAUDE_VERSION" ] || die "src/config/programs.rs does not say which CLI it wants"

  if [ -z "${CLAUDE_BIN:-}" ]; then
    package="@anthropic-ai/claude-code-linux-$arch$libc"
    claude_folder="claude-$CLAUDE_VERSION-$arch$libc"
    if [ ! -d "$TOOLS/$claude_folder" ]; then
      say "Fetching the Claude Code CLI $CLAUDE_VERSION (about 175 MB, once)"
      install_packages "$claude_folder" "$package@$CLAUDE_VERSION"
    fi
    CLAUDE_BIN="$TOOLS/$claude_folder/lib/node_modules/$package/claude"
  fi
  [ -x "$CLAUDE_BIN" ] || die "there is no Claude Code CLI at $CLAUDE_BIN; remove that folder or unset CLAUDE_BIN"
  export CLAUDE_BIN

  found="$(node --version 2>/dev/null || echo none)"
  if ! at_least "${found#v}" "$MIN_NODE_VERSION" || [ "$found" = none ]; then
    [ -z "$libc" ] || die "Node $MIN_NODE_VERSION or newer is missing: apk add nodejs npm"
    bring_node
    PATH="$NODE_FOLDER/bin:$PATH"
  fi
  export PATH
}

# Puts a folder with Node and npm, in bin/ and lib/node_modules/, into NODE_FOLDER.
bring_node() {
  local arch
  case "$(uname -m)" in
    x86_64) arch=x64 ;;
    *) arch=arm64 ;;
  esac
  NODE_FOLDER="$TOOLS/node-$NODE_VERSION-npm-$NPM_VERSION-$arch"
  if [ ! -d "$NODE_FOLDER" ]; then
    say "Fetching Node $NODE_VERSION (about 50 MB, once)"
    install_packages "${NODE_FOLDER##*/}" "node-linux-$arch@$NODE_VERSION" "npm@$NPM_VERSION"
  fi
}
