#!/usr/bin/env bash
# The programs that `make test` drives and pip does not bring: Chromium, Node.js with npm, and redis-server.
# Root on a Debian or Ubuntu gets what is missing by apt; everybody else gets the command to run, and exit status 1.
set -euo pipefail

has() { command -v "$1" >/dev/null 2>&1; }

has_chromium() {  # the system's, or Playwright's own
  has chromium || has chromium-browser || has google-chrome ||
    compgen -G "${PLAYWRIGHT_BROWSERS_PATH:-$HOME/.cache/ms-playwright}/chromium-*" >/dev/null ||
    compgen -G "$HOME/Library/Caches/ms-playwright/chromium-*" >/dev/null
}

new_node() { has node && node -e 'process.exit(Number(parseInt(process.versions.node) < 20))'; }

look() {
  missing=()
  has_chromium || missing+=(chromium fonts-dejavu-core)
  new_node || missing+=(nodejs)
  has npm || missing+=(npm)
  has redis-server || missing+=(redis-server)
}

by_apt() {
  apt-get update -qq
  for package in "${missing[@]}"; do
    if [ "$package" = npm ] && has npm; then continue; fi  # it came with the nodejs of nodesource.com
    apt-get install -y -qq --no-install-recommends "$package"
  done
}

look
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" -eq 0 ] && has apt-get; then
  echo "make test needs ${missing[*]}: apt-get installs them"
  DEBIAN_FRONTEND=noninteractive by_apt || true  # what is then still missing is named below
  hash -r
  look
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "make test needs programs that are not on this machine: ${missing[*]}. To install them, run"
  if has apt-get; then
    echo "    sudo apt-get update && sudo apt-get install -y ${missing[*]}"
  elif has brew; then
    echo "    brew install node redis && brew install --cask chromium"
  else
    echo "    the package manager of this system, for Chromium, Node.js 20 or newer with npm, and redis"
  fi
  if has node && ! new_node; then
    echo "Node.js is $(node --version), the widgets need 20 or newer: https://nodejs.org/en/download"
  fi
  echo "make lab and make demo need none of them."
  exit 1
fi >&2
