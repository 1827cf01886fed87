#!/usr/bin/env bash
# The 2016 study's tables again, at a scale fit for 2 cores: `make study` builds what this needs and runs it, as root.
#
# Reports go to target/study/, one folder a matrix (docs/study/*.toml). What is there is not measured again, so an
# interrupted study goes on; remove the folder to begin anew. Afterwards, whatever could be measured is drawn and
# written down: docs/study/index.html and docs/study/figures.md. MINUTES (85) is what all of it may take.
set -euo pipefail
cd "$(dirname "$0")/.."

vmferry=${VMFERRY:-target/release/vmferry}
reports=${STUDY:-target/study}
pages=${PAGES:-docs/study}
end=$((SECONDS + 60 * ${MINUTES:-85}))

folders=()
for matrix in ${MATRICES:-docs/study/*.toml}; do
    folder=$reports/$(basename "$matrix" .toml)
    folders+=("$folder")
    left=$((end - SECONDS))
    if [ "$left" -le 0 ]; then continue; fi
    # 124: the time is over. 1: some runs failed, which the figures show; the others stand.
    status=0
    timeout --foreground --signal=TERM "$left" "$vmferry" bench batch "$matrix" -o "$folder" || status=$?
    case $status in 0 | 1 | 124) ;; *) exit "$status" ;; esac
done

measured=()
for folder in "${folders[@]}"; do
    if compgen -G "$folder/*-r*.json" >/dev/null; then measured+=("$folder"); fi
done
if [ ${#measured[@]} = 0 ]; then
    echo "study: nothing could be measured" >&2
    exit 1
fi
mkdir -p "$pages"
"$vmferry" bench page "${measured[@]}" --title "The study again" -o "$pages/index.html"
{
    echo "# The figures of the study"
    echo
    echo "Medians, as \`make study\` wrote them. The [reading](README.md) says what they tell."
    for folder in "${measured[@]}"; do
        printf '\n## %s\n\n' "$(basename "$folder")"
        "$vmferry" bench compare --table "$folder"
        for skipped in "$folder"/*.skipped; do
            if [ -e "$skipped" ]; then printf '\n%s was skipped: %s\n' "$(basename "$skipped" .skipped)" "$(cat "$skipped")"; fi
        done
    done
} >"$pages/figures.md"
echo "study: $pages/index.html, $pages/figures.md"
