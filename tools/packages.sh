#!/bin/sh
# Install the Debian packages that the named needs stand for, after saying what and why.
# usage: packages.sh NEED...   (venv, rabbitmq, postgresql, debootstrap)
set -eu
wanted=""
for need in "$@"; do
  case "$need" in
    venv)
      python3 -c 'import ensurepip, venv' 2>/dev/null || wanted="$wanted python3-venv"
      why="the virtual environment" ;;
    rabbitmq)
      [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || wanted="$wanted rabbitmq-server"
      why="a private message broker" ;;
    postgresql)
      ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || wanted="$wanted postgresql"
      why="a private database server" ;;
    debootstrap)
      [ -d .services/debian13 ] || command -v debootstrap >/dev/null 2>&1 || wanted="$wanted debootstrap"
      why="a second Debian with RabbitMQ 4" ;;
    *) echo "packages.sh: unknown need '$need' (known: venv, rabbitmq, postgresql, debootstrap)" >&2; exit 2 ;;
  esac
done
[ -n "$wanted" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
  echo "This needs$wanted, and only Debian's apt-get is known here. Install it and try again." >&2
  exit 2
fi
as_root=""
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null 2>&1 || { echo "Installing$wanted needs root or sudo." >&2; exit 2; }
  as_root="sudo"
fi
echo "Installing Debian packages:$wanted ($why). Their own services are not used: this project starts private ones."
log=$(mktemp)
if ! { $as_root apt-get update -qq && $as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $wanted; } >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "apt-get could not install$wanted; the lines above say why (all of it: $log)." >&2
  exit 1
fi
rm -f "$log"
