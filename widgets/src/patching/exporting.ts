// The grid as a file of comma-separated values, made in the page.
import type { Values, View } from "./types";

const HEAD = ["layer", "kind", "position", "token", "source_token", "estimate", "true"];

/** The same rows and columns as `grid.to_pandas()`. */
export function asCsv(view: View, values: Values): string {
  const lines = [HEAD.join(",")];
  for (const kind of view.kinds) {
    for (const layer of view.layers) {
      view.positions.forEach((position, i) => {
        const [token = "", source = ""] = view.tokens[i] ?? [];
        const numbers = [values.estimate(kind, layer, position), values.patched(kind, layer, position) ?? ""];
        lines.push([layer, kind, position, quoted(token), quoted(source), ...numbers].join(","));
      });
    }
  }
  return `${lines.join("\n")}\n`;
}

const quoted = (text: string) => `"${text.replaceAll('"', '""')}"`;
