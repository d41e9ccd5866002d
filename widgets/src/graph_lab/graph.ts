// The graph as numbers, and its pruning: the same rule as `graph.prune` in Python.
import { counted, integer } from "../shared/format";
import { tokenLabel } from "../shared/tokens";
import type { View } from "./types";

export type Kind = "feature" | "error" | "token" | "logit";

/** What is shown: nodes and edges by number, in order. */
export interface Part {
  nodes: number[];
  edges: number[];
  has: Uint8Array;
}

export class Graph {
  readonly places: Int32Array;
  readonly values: Float32Array;
  readonly influence: Float32Array;
  readonly incoming: Float32Array;
  readonly sources: Uint32Array;
  readonly targets: Uint32Array;
  readonly effects: Float32Array;
  private ends: [number, number, number, number];

  constructor(readonly view: View) {
    this.places = new Int32Array(bytes(view.places));
    this.values = new Float32Array(bytes(view.values));
    this.influence = new Float32Array(bytes(view.influence));
    this.incoming = new Float32Array(bytes(view.incoming));
    this.sources = new Uint32Array(bytes(view.sources));
    this.targets = new Uint32Array(bytes(view.targets));
    this.effects = new Float32Array(bytes(view.effects));
    let end = 0;
    this.ends = view.counts.map((count) => (end += count)) as Graph["ends"];
  }

  get length(): number {
    return this.ends[3];
  }

  kind(node: number): Kind {
    const [features, errors, tokens] = this.ends;
    return node < features ? "feature" : node < errors ? "error" : node < tokens ? "token" : "logit";
  }

  layer = (node: number): number => this.places[3 * node] ?? 0;
  position = (node: number): number => this.places[3 * node + 1] ?? 0;
  feature = (node: number): number => this.places[3 * node + 2] ?? 0;
  source = (edge: number): number => this.sources[edge] ?? 0;
  target = (edge: number): number => this.targets[edge] ?? 0;
  effect = (edge: number): number => this.effects[edge] ?? 0;
  /** The row from below: tokens, layers, outputs. */
  row = (node: number): number => this.layer(node) + 1;
  output = (node: number): string => this.view.outputs[node - this.ends[2]] ?? "";
  chance = (node: number): number => this.view.weights[node - this.ends[2]] ?? 0;

  /** The part of all that adds to an edge's target that this edge is. */
  portion(edge: number): number {
    const whole = this.incoming[this.target(edge)] ?? 0;
    return whole > 0 ? Math.abs(this.effect(edge)) / whole : 0;
  }

  edgeOf(source: number, target: number): number {
    return this.sources.findIndex((from, edge) => from === source && this.targets[edge] === target);
  }

  /** In words, without its name. */
  title(node: number): string {
    const kind = this.kind(node);
    if (kind === "logit") return `output ${tokenLabel(this.output(node))}`;
    const at = `${tokenLabel(this.view.tokens[this.position(node)] ?? "")} (${this.position(node)})`;
    if (kind === "token") return `token ${at}`;
    return `layer ${this.layer(node)}, ${kind === "error" ? "error" : `feature ${this.feature(node)}`} at ${at}`;
  }

  /** Where a feature with a name stands, in few words. */
  place(node: number): string {
    return `layer ${this.layer(node)}, ${this.feature(node)} at ${tokenLabel(this.view.tokens[this.position(node)] ?? "")} (${this.position(node)})`;
  }

  /** The nodes with most influence, up to a share of all; then the edges; then no feature without an edge in and out,
   *  no error without one out. */
  prune(nodes: number, edges: number): Part {
    const [features, inner, sources] = this.ends;
    const least = threshold(this.influence, nodes);
    const has = new Uint8Array(this.length);
    for (let i = 0; i < has.length; i += 1) has[i] = i >= inner || (this.influence[i] ?? 0) >= least ? 1 : 0;
    let linked = range(this.sources.length).filter((edge) => has[this.source(edge)] && has[this.target(edge)]);
    const scores = this.scores(linked, features, sources);
    const weak = threshold(scores.filter((score) => score > 0), edges);
    linked = linked.filter((_, i) => (scores[i] ?? 0) > 0 && (scores[i] ?? 0) >= weak);
    for (;;) {
      const [into, out] = [new Uint8Array(this.length), new Uint8Array(this.length)];
      for (const edge of linked) into[this.target(edge)] = out[this.source(edge)] = 1;
      let same = true;
      for (let i = 0; i < inner; i += 1) {
        if (has[i] && (!out[i] || (i < features && !into[i]))) [has[i], same] = [0, false];
      }
      if (same) break;
      linked = linked.filter((edge) => has[this.source(edge)] && has[this.target(edge)]);
    }
    return { nodes: range(this.length).filter((i) => has[i]), edges: linked, has };
  }

  /** How much influence on the outputs each edge carries. */
  private scores(edges: number[], features: number, sources: number): Float64Array {
    const sizes = new Float64Array(this.length);
    for (const edge of edges) sizes[this.target(edge)]! += Math.abs(this.effect(edge));
    const shared = Float64Array.from(edges, (edge) => Math.abs(this.effect(edge)) / Math.max(sizes[this.target(edge)] ?? 0, 1e-10));
    const found = new Float64Array(this.length);
    for (let i = sources; i < this.length; i += 1) found[i] = this.chance(i);
    let flow = found;
    for (let step = 0; step <= features + 1 && flow.some((value) => value > 0); step += 1) {
      const next = new Float64Array(this.length);
      edges.forEach((edge, i) => (next[this.source(edge)]! += (flow[this.target(edge)] ?? 0) * (shared[i] ?? 0)));
      next.forEach((value, i) => (found[i]! += value));
      flow = next;
    }
    return Float64Array.from(edges, (edge, i) => (shared[i] ?? 0) * (found[this.target(edge)] ?? 0));
  }

  /** In words: what is shown, and what is not. */
  said(part: Part): string {
    const [nodes, edges] = this.view.left;
    const rest = nodes + edges > 0 ? `; ${counted(nodes, "weak node")} and ${counted(edges, "weak edge")} were not sent` : "";
    return `${integer(part.nodes.length)} of ${counted(this.length, "node")}, ${integer(part.edges.length)} of ${counted(this.sources.length, "edge")}${rest}`;
  }
}

/** The least score among the largest that make up a share of all. */
function threshold(scores: Float32Array | Float64Array, share: number): number {
  const ordered = Float64Array.from(scores).sort().reverse();
  if (share === 1 || ordered.length === 0) return ordered.at(-1) ?? 0;
  const whole = ordered.reduce((sum, score) => sum + score, 0);
  let sum = 0;
  const place = ordered.findIndex((score) => (sum += score) / whole >= share);
  return ordered[place < 0 ? ordered.length - 1 : place] ?? 0;
}

export const range = (count: number): number[] => Array.from({ length: count }, (_, i) => i);

function bytes(text: string): ArrayBuffer {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
}
