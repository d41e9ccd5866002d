// The inspector in a page without a kernel: its features, its list and its order come from the page.
import { counted } from "../shared/format";
import type { FrozenModel } from "../shared/frozen";
import type { FeatureView, Note, Row, Sort } from "./types";

type Kept = Record<string, { view: FeatureView; note: Note }>;
type KeptRow = Row & { norm: number };

/** Answers changes of `feature`, `query` and `sort` as Python would. */
export function frozenInspector(model: FrozenModel): void {
  const kept = model.get("kept") as Kept;
  const rows = model.get("results") as KeptRow[];

  model.on("change:feature", () => {
    const feature = model.get("feature") as number;
    const found = kept[String(feature)];
    if (found) {
      model.set("error", "");
      model.set("note", found.note);
      model.set("view", found.view);
      return;
    }
    model.set("feature", (model.get("view") as FeatureView).feature);
    model.set("error", `feature ${feature} is not kept in this page; it holds ${counted(rows.length, "feature")}`);
  });
  const list = () => {
    const query = (model.get("query") as string).trim().toLowerCase();
    const by = model.get("sort") as Sort;
    const found = rows.filter((row) => [row.label, ...row.tokens].some((text) => text.toLowerCase().includes(query)));
    if (by !== "best") found.sort((a, b) => b[by] - a[by]);
    model.set("results_note", `${found.length} of the ${counted(rows.length, "feature")} kept in this page, by a piece of their label or of what they fire on`);
    model.set("results", found);
  };
  model.on("change:query", list);
  model.on("change:sort", list);
}
