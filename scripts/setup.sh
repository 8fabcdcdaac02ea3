# Sourced by the scripts beside it: goes to the checkout's root and sees to a virtual environment there, `.venv`, made once and
# brought up to date when pyproject.toml has changed. Sets `python`.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  say "No Python of at least 3.11 was found. Install one, or name it: PYTHON=/path/to/python3 $0"
  return 1
}

python="$PWD/.venv/bin/python"
stamp=.venv/.installed-for

if [ ! -x "$python" ]; then
  base=$(find_python)
  say "Creating .venv with $("$base" --version)"
  if ! "$base" -m venv .venv >&2; then
    rm -rf .venv
    say "The virtual environment could not be made; on Debian and Ubuntu, install the package python3-venv."
    exit 1
  fi
fi
if ! cmp -s pyproject.toml "$stamp"; then
  say "Installing the project and its development tools into .venv (a minute or two, only when pyproject.toml has changed)"
  "$python" -m pip install --quiet --disable-pip-version-check --editable '.[dev]' >&2
  cp pyproject.toml "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
