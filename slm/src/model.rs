//! Runs the transformer: one token in, a score for every possible next token out.
//!
//! The llama architecture in 32-bit floats: RMS norms, rotary positions over neighbouring pairs, grouped-query
//! attention over a cache of keys and values, and a gated feed-forward layer. One core, no allocation per token.

use crate::gguf::{Error, Gguf};
use crate::tokenizer::Id;

/// Bounds on what a file may ask for; far above any model one core can run, low enough that no product overflows.
const WIDTH_MAX: u64 = 16_384;
const LAYERS_MAX: u64 = 512;
const CONTEXT_MAX: u64 = 32_768;

/// The weights of a model and the numbers that say how to use them.
#[derive(Debug)]
pub(crate) struct Model {
    width: usize,
    heads: usize,
    kv_heads: usize,
    head_width: usize,
    hidden: usize,
    epsilon: f32,
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// None when the embedding serves for both.
    output: Option<Vec<f32>>,
    /// Cosine and sine for each position and pair of a head.
    turns: Vec<(f32, f32)>,
    /// Tokens the model can look back on, its own included.
    pub(crate) context: usize,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attention_output: Vec<f32>,
    feed_norm: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

impl Model {
    /// `vocabulary` is the number of tokens the file's tokenizer has.
    pub(crate) fn from_gguf(file: &mut Gguf, vocabulary: usize) -> Result<Self, Error> {
        let architecture = file.text("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::Unsupported(format!("architecture {architecture}; llama is")));
        }
        if file.has("llama.rope.scaling.type") || file.has_tensor("rope_freqs.weight") {
            return Err(Error::Unsupported("scaled rotary positions".into()));
        }
        let width = file.size("llama.embedding_length", "embedding length", WIDTH_MAX)?;
        let heads = file.size("llama.attention.head_count", "head count", WIDTH_MAX)?;
        let kv_heads = match file.has("llama.attention.head_count_kv") {
            true => file.size("llama.attention.head_count_kv", "key-value head count", WIDTH_MAX)?,
            false => heads,
        };
        let hidden = file.size("llama.feed_forward_length", "feed-forward length", 8 * WIDTH_MAX)?;
        let layer_count = file.size("llama.block_count", "block count", LAYERS_MAX)?;
        let context = file.size("llama.context_length", "context length", CONTEXT_MAX)?;
        let head_width = width / heads;
        if !width.is_multiple_of(heads) || !heads.is_multiple_of(kv_heads) || !head_width.is_multiple_of(2) {
            return Err(Error::OutOfBounds { what: "head count", value: heads as u64 });
        }
        if file.has("llama.rope.dimension_count") && file.u64("llama.rope.dimension_count")? != head_width as u64 {
            return Err(Error::Unsupported("rotary positions over a part of a head".into()));
        }
        let base = if file.has("llama.rope.freq_base") { file.f32("llama.rope.freq_base")? } else { 10_000.0 };

        let kv_width = kv_heads * head_width;
        let mut layers = Vec::new();
        for i in 0..layer_count {
            let mut tensor = |name: &str, values: usize| file.tensor(&format!("blk.{i}.{name}.weight"), values);
            layers.push(Layer {
                attention_norm: tensor("attn_norm", width)?,
                query: tensor("attn_q", width * width)?,
                key: tensor("attn_k", kv_width * width)?,
                value: tensor("attn_v", kv_width * width)?,
                attention_output: tensor("attn_output", width * width)?,
                feed_norm: tensor("ffn_norm", width)?,
                gate: tensor("ffn_gate", hidden * width)?,
                up: tensor("ffn_up", hidden * width)?,
                down: tensor("ffn_down", width * hidden)?,
            });
        }
        let turns = (0..context)
            .flat_map(|position| {
                (0..head_width / 2).map(move |pair| {
                    let angle = position as f32 / base.powf(2.0 * pair as f32 / head_width as f32);
                    (angle.cos(), angle.sin())
                })
            })
            .collect();
        Ok(Self {
            epsilon: file.f32("llama.attention.layer_norm_rms_epsilon")?,
            embedding: file.tensor("token_embd.weight", vocabulary * width)?,
            norm: file.tensor("output_norm.weight", width)?,
            output: if file.has_tensor("output.weight") { Some(file.tensor("output.weight", vocabulary * width)?) } else { None },
            width,
            heads,
            kv_heads,
            head_width,
            hidden,
            layers,
            turns,
            context,
        })
    }

    /// The memory one [`State`] takes when its context is full.
    pub(crate) fn state_bytes(&self) -> usize {
        let cache = 2 * self.layers.len() * self.context * self.kv_heads * self.head_width;
        let scratch = 5 * self.width + 2 * self.hidden + self.context + self.vocabulary();
        (cache + scratch) * size_of::<f32>()
    }

    fn vocabulary(&self) -> usize {
        self.embedding.len() / self.width
    }

    /// Gives `token` to the model.
    ///
    /// The caller keeps `state.position` below `context` and `token` inside the vocabulary.
    pub(crate) fn step(&self, state: &mut State, token: Id) {
        let (width, head_width, kv_width) = (self.width, self.head_width, self.kv_heads * self.head_width);
        let State { position, keys, values, x, y, query, mixed, gate, up, weights, .. } = state;
        let turns = &self.turns[*position * head_width / 2..][..head_width / 2];
        x.copy_from_slice(&self.embedding[token as usize * width..][..width]);

        for ((layer, keys), values) in self.layers.iter().zip(keys).zip(values) {
            norm(x, &layer.attention_norm, self.epsilon, y);
            multiply(&layer.query, y, query);
            let at = keys.len();
            keys.resize(at + kv_width, 0.0);
            values.resize(at + kv_width, 0.0);
            multiply(&layer.key, y, &mut keys[at..]);
            multiply(&layer.value, y, &mut values[at..]);
            rotate(query, turns);
            rotate(&mut keys[at..], turns);

            let shared_by = self.heads / self.kv_heads;
            for (head, (query, mixed)) in query.chunks_exact(head_width).zip(mixed.chunks_exact_mut(head_width)).enumerate() {
                let lane = head / shared_by * head_width;
                weights.clear();
                weights.extend(keys.chunks_exact(kv_width).map(|k| dot(query, &k[lane..lane + head_width]) / (head_width as f32).sqrt()));
                softmax(weights);
                mixed.fill(0.0);
                for (weight, value) in weights.iter().zip(values.chunks_exact(kv_width)) {
                    for (m, v) in mixed.iter_mut().zip(&value[lane..lane + head_width]) {
                        *m += weight * v;
                    }
                }
            }
            multiply(&layer.attention_output, mixed, y);
            add(x, y);

            norm(x, &layer.feed_norm, self.epsilon, y);
            multiply(&layer.gate, y, gate);
            multiply(&layer.up, y, up);
            for (g, u) in gate.iter_mut().zip(up.iter()) {
                *g *= u / (1.0 + (-*g).exp());
            }
            multiply(&layer.down, gate, y);
            add(x, y);
        }
        *position += 1;
    }

    /// Scores every token as the next one, by what the model was given so far: into `state.logits`.
    pub(crate) fn score(&self, state: &mut State) {
        norm(&state.x, &self.norm, self.epsilon, &mut state.y);
        multiply(self.output.as_ref().unwrap_or(&self.embedding), &state.y, &mut state.logits);
    }
}

/// What a model remembers of one conversation, and the room it works in.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) position: usize,
    /// One score per token of the vocabulary.
    pub(crate) logits: Vec<f32>,
    /// Per layer: the keys and values of all positions so far, one row each.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    x: Vec<f32>,
    y: Vec<f32>,
    query: Vec<f32>,
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    weights: Vec<f32>,
}

impl State {
    /// `tokens` is how many steps are to come: room for their keys and values is made at once.
    pub(crate) fn new(model: &Model, tokens: usize) -> Self {
        let room = tokens.min(model.context) * model.kv_heads * model.head_width;
        let cache = || model.layers.iter().map(|_| Vec::with_capacity(room)).collect();
        let zeros = |n| vec![0.0; n];
        Self {
            position: 0,
            logits: zeros(model.vocabulary()),
            keys: cache(),
            values: cache(),
            x: zeros(model.width),
            y: zeros(model.width),
            query: zeros(model.width),
            mixed: zeros(model.width),
            gate: zeros(model.hidden),
            up: zeros(model.hidden),
            weights: Vec::with_capacity(tokens.min(model.context)),
        }
    }
}

/// Eight sums side by side, so that the compiler may use vector registers: it must not reorder a single float sum.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0f32; 8];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// `out = matrix · x`; the matrix is stored row by row.
fn multiply(matrix: &[f32], x: &[f32], out: &mut [f32]) {
    for (o, row) in out.iter_mut().zip(matrix.chunks_exact(x.len())) {
        *o = dot(row, x);
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

fn norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let scale = 1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = x * scale * w;
    }
}

/// Turns each pair of neighbours in each head by its angle at this position.
fn rotate(rows: &mut [f32], turns: &[(f32, f32)]) {
    for head in rows.chunks_exact_mut(2 * turns.len()) {
        for ([a, b], (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        }
    }
}

pub(crate) fn softmax(x: &mut [f32]) {
    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in x.iter_mut() {
        *x = (*x - most).exp();
        sum += *x;
    }
    for x in x.iter_mut() {
        *x /= sum;
    }
}
