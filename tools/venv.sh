#!/bin/sh
# Make the virtual environment from pinned and hashed requirements, and put the project into it.
# usage: venv.sh PYTHON VENV REQUIREMENTS
set -eu
python=$1 venv=$2 requirements=$3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed; '$python' is $("$python" -V 2>&1)." >&2; exit 2; }
sh tools/packages.sh venv
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "Installing $(grep -c '==' "$requirements") pinned packages into $venv ..."
# the file names every package, so nothing is resolved: a new release of one cannot break the installation
"$venv/bin/python" -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r "$requirements"
# a path file instead of an editable install: needs no build tool and no network
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
pwd > "$site/nexus_export_checkout.pth"
printf '#!/bin/sh\nexec "$(dirname "$0")/python" -m consumer "$@"\n' > "$venv/bin/nexus-export"
chmod +x "$venv/bin/nexus-export"
