#!/bin/sh
# Is there a chromium for the browser tests of the report? Where there is none, Debian's is installed (290 MB with what
# it needs), by root or by sudo without a password. Never fails: without a browser those tests are skipped and say so.
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null && exit 0
done
for own in "${PLAYWRIGHT_BROWSERS_PATH:-$HOME/.cache/ms-playwright}"/chromium-*; do
    [ -d "$own" ] && exit 0
done

skip() {
    echo "no chromium: $1. The browser tests of the report will be skipped." >&2
    exit 0
}

command -v apt-get >/dev/null || skip "no apt-get here; install chromium, or run: .venv/bin/playwright install chromium"
if [ "$(id -u)" -eq 0 ]; then
    sudo=""
elif sudo -n true 2>/dev/null; then
    sudo="sudo -n"
else
    skip "neither root nor sudo without a password; run: sudo apt-get install chromium"
fi

apt() {
    timeout 240 $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 "$@" >&2
}

echo "installing chromium for the browser tests of the report (290 MB)" >&2
apt update || skip "apt-get update failed"
apt install --yes --no-install-recommends chromium fonts-dejavu-core || skip "apt-get install chromium failed"
