#!/bin/sh
# Images and fonts for the mini backbone, from a Debian 12 or newer mirror and the npm registry. Nothing is installed:
# packages are downloaded and unpacked. Usage: fetch.sh FOLDER (about 6 GB)
set -eu
mkdir -p "$1/packages" "$1/fonts" "$1/npm" "$1/download"
here=$(cd "$(dirname "$0")" && pwd)
cd "$1/download"
unpack() { # package folder
    apt-get download -q "$1" >/dev/null 2>&1 || { echo "no package $1" >&2; return 0; }
    mkdir -p "../$2/$1"
    dpkg -x "$1"_*.deb "../$2/$1"
    rm "$1"_*.deb
}
sed -n 's/^ *"\([a-z0-9.+-]*\)": [0-9]*,\{0,1\}$/\1/p' "$here/sources.json" | grep -v '^emoji-datasource-twitter$' |
    while read -r package; do unpack "$package" packages; done
while read -r package; do unpack "$package" fonts; done <"$here/fonts.txt"
npm pack --silent emoji-datasource-twitter@15.0.1 >/dev/null
tar -xzf emoji-datasource-twitter-15.0.1.tgz -C ../npm
