// Bundles every widget into sae_lab/widgets/static/<name>.{js,css}.
// The built files are committed, so that a pip install needs no Node; a rebuild must give no difference.
import { stat } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const ALL = ["inspector", "edits", "tokens", "steering", "patching", "monitor", "feature_map", "graph_lab", "site"];
// `node build.mjs steering` builds one.
const WIDGETS = process.argv.length > 2 ? process.argv.slice(2) : ALL;
// anywidget stores the source in every instance, hence in every notebook that saves widget state.
const MAX_BYTES = 60_000;

const here = fileURLToPath(new URL(".", import.meta.url));
const out = fileURLToPath(new URL("../sae_lab/widgets/static/", import.meta.url));

for (const name of WIDGETS) {
  await build({
    absWorkingDir: here,
    entryPoints: { [name]: `src/${name}/index.ts` },
    outdir: out,
    bundle: true,
    format: name === "site" ? "iife" : "esm", // a page from disk may not load modules
    target: "es2022",
    minify: true,
    charset: "utf8",
    legalComments: "none",
    logLevel: "warning",
  });
  await build({
    absWorkingDir: here,
    entryPoints: { [name]: `src/${name}/index.css` },
    outdir: out,
    bundle: true,
    target: ["chrome111", "firefox113", "safari16.2"],
    minify: true,
    charset: "utf8",
    legalComments: "none",
    logLevel: "warning",
  });
  for (const kind of ["js", "css"]) {
    const { size } = await stat(`${out}${name}.${kind}`);
    console.log(`${name}.${kind}  ${size} bytes`);
    if (size >= MAX_BYTES) throw new Error(`${name}.${kind} must stay under ${MAX_BYTES} bytes, got ${size}`);
  }
}
