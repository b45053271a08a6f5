/* One step of Llama and its kin over key/value rows on a processor: every token with an adapter of its own.

serving/native.py compiles this on the machine it runs on, once for each type of weights: with -DBF16 for bfloat16, else
for float32. All arithmetic is in float32.

What comes out for a token depends on that token's row alone, to the last bit: every sum is added up in one order, whatever
else is in the step. So a reply is the same alone or in a full batch, its prompt read whole, in pieces, or remembered.

A step is a number of phases, each of many tasks; a phase begins when all tasks of the one before are done. All threads walk
through the phases and take tasks where some are left. None is waited for unless it has taken one: a thread whose core is busy
with something else (HTTP, say) keeps nobody, and skips what the others did meanwhile. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

/* Vectors, by GCC's and Clang's extension. */

#ifdef __AVX512F__
#define LANES 16
#define COLUMNS 6 /* tokens multiplied at a time: as many as there are registers for */
#else
#define LANES 8
#define COLUMNS 3
#endif
#define ROWS 4 /* outputs multiplied at a time */
#define PANEL 64 /* outputs a task */
#define TOKENS 48 /* tokens that stay in the cache while a panel goes by */
#define inline_ static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

inline_ vec load(const float *p) { return *(const vec *)p; }
inline_ void store(float *p, vec v) { *(vec *)p = v; }
/* x * y + z, rounded once where there is an instruction for it. Said outright, and nothing else is fused
   (-ffp-contract=off), because compilers choose place by place, and then a sum would depend on the company it is made in. */
#if defined(__AVX512F__)
inline_ vec fused(vec x, vec y, vec z) { return (vec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z); }
#elif defined(__FMA__)
inline_ vec fused(vec x, vec y, vec z) { return (vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z); }
#else
inline_ vec fused(vec x, vec y, vec z) { return x * y + z; }
#endif
inline_ vec all(float x) { return x - (vec){0}; }

#ifdef BF16
typedef uint16_t weight;
typedef uint16_t halfs __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
inline_ vec load_weight(const weight *p) { return (vec)(__builtin_convertvector(*(const halfs *)p, ivec) << 16); }
inline_ float from_weight(weight w) {
  uint32_t bits = (uint32_t)w << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline_ weight to_weight(float x) { /* to the nearest, ties to even; a NaN stays one */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
typedef float weight;
inline_ vec load_weight(const weight *p) { return load(p); }
inline_ float from_weight(weight w) { return w; }
inline_ weight to_weight(float x) { return x; }
#endif

inline_ float total(vec v) {
#if LANES == 16
  vec8 low, high;
  memcpy(&low, &v, 32), memcpy(&high, (char *)&v + 32, 32);
  vec8 half = low + high;
#else
  vec8 half = v;
#endif
  vec4 a, b;
  memcpy(&a, &half, 16), memcpy(&b, (char *)&half + 16, 16);
  vec4 quarter = a + b;
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

inline_ vec where(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

/* e^x to two units in the last place (Cephes' polynomial); a NaN stays one. */
inline_ vec exponential(vec x) {
  x = where(x > 88.0f, all(88.0f), where(x < -87.0f, all(-87.0f), x));
  vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounded to a whole number */
  vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

/* What is computed: the model, as serving/native.py describes it. Sizes are in numbers, not bytes. */

typedef struct {
  const weight *w;   /* [outputs, inputs] */
  const float *bias; /* [outputs] or NULL */
  int32_t outputs;
} Linear;

typedef struct { /* linear layers that read the same input, with their adapters; ranks: of all of them together */
  int32_t inputs, outputs, members, rank;
  Linear member[3];
  const float *a; /* [slots, members * rank, inputs] */
  const float *b; /* [slots, members * rank, outputs] */
} Site;

typedef struct {
  const float *attention_norm, *q_norm, *k_norm, *feed_norm; /* q_norm and k_norm may be NULL */
  Site qkv, o, gate_up, down;
  weight *keys, *values; /* [rows, kv_heads, length, dim] */
  int32_t window;        /* positions a token sees, itself included; 0 for all */
} Layer;

typedef struct {
  int32_t layers, hidden, heads, kv_heads, dim, feed, vocab, length;
  float eps, scaling;
  const weight *embedding; /* [vocab, hidden] */
  const float *norm, *cos, *sin; /* cos, sin: [length, dim] */
  Site head;
  const Layer *layer;
} Model;

typedef struct {
  int32_t count, last_count;
  const int32_t *id, *row, *position, *slot; /* of each token; slot -1 for none */
  const int32_t *last;                       /* the tokens whose logits are wanted */
  float *logits;                             /* [last_count, vocab] */
} Tokens;

typedef struct {
  Model m;
  Tokens t;
  int32_t threads;
  int32_t room, widest, deepest, ranks; /* tokens there is memory for; the most outputs, inputs and ranks of a product */
  int32_t together, queries; /* tokens of one row that look at it together, with so many heads in all */
  float *x, *h, *y, *z, *low; /* [room, …]: sum of the layers, input, output and other input of a product, A·input */
  float *scratch;             /* of each thread */
  size_t scratch_size;
  pthread_t *thread;
  pthread_mutex_t lock;
  pthread_cond_t wake;
  int32_t phases;      /* of a step */
  _Atomic uint64_t step;
  _Atomic uint64_t ticket; /* the phase that runs, counted from the first step on, and how many of its tasks are taken */
  atomic_int finished; /* of these tasks */
  atomic_int closing;
} Stepper;

typedef struct {
  Stepper *e;
  int32_t number;
} Worker;

/* Threads. */

inline_ void relax(int spins) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
  if (spins > 500) sched_yield();
}

/* For a test: threads are late at any place. */
#ifdef JITTER
#include <time.h>
static void jitter(void) {
  static _Thread_local uint32_t state;
  if (!state) state = (uint32_t)(uintptr_t)&state | 1;
  state = state * 1664525 + 1013904223;
  if (state >> 26 == 0) nanosleep(&(struct timespec){.tv_nsec = state >> 8 & 0xffff}, NULL);
}
#else
#define jitter()
#endif

#define TASK_BITS 20 /* of a ticket: more tasks than any phase has; the others are the phase's */
#define TASKS (((uint64_t)1 << TASK_BITS) - 1)

inline_ int runs(uint64_t ticket, uint64_t phase) { return (ticket & ~TASKS) == phase << TASK_BITS; }

/* The next task of a phase of `count` (from 1 to TASKS); -1 when none is left. A thread that was away for long may read a later
   step's sizes and pointers, even while they are written. That race is meant: only where the exchange below finds the phase
   still running does anything come of what was read, and while a phase runs nobody writes any of it. */
inline_ int take(Stepper *e, uint64_t phase, int count) {
  jitter();
  uint64_t ticket = atomic_load(&e->ticket);
  do
    if (!runs(ticket, phase) || (int)(ticket & TASKS) >= count) return -1;
  while (!atomic_compare_exchange_weak(&e->ticket, &ticket, ticket + 1));
  return ticket & TASKS;
}

/* One more task of a phase of `count` is done; with the last one the next phase begins. */
inline_ void finish(Stepper *e, uint64_t phase, int count) {
  jitter();
  if (atomic_fetch_add(&e->finished, 1) + 1 < count) return;
  jitter();
  atomic_store(&e->finished, 0);
  atomic_store(&e->ticket, (phase + 1) << TASK_BITS);
}

static void wait_for_all(Stepper *e, uint64_t phase) {
  for (int spins = 0; runs(atomic_load(&e->ticket), phase); spins++) relax(spins);
}

/* Products: y[token][output] = w[output] · x[token], four outputs of a few tokens at a time. The next four are asked for meanwhile,
   in the order they lie in: processors guess one stream of memory better than four. Past the end nothing is read. */

/* Where there are 32 registers they hold the sums and the weights, else the sums and the tokens. */
#ifdef __AVX512F__
#define KEEP(v) __asm__("" : "+v"(v)) /* in its register: compilers would load it anew for each product */
#else
#define KEEP(v)
#endif

#define DEFINE_TILE(name, type, load_, from_, ahead)                                                                      \
  inline_ void name(const int rows, const int columns, int inputs, const type *w, const float *x, float *y, int width) { \
    vec sum[ROWS][COLUMNS] = {0};                                                                                        \
    int k = 0;                                                                                                           \
    for (; k + LANES <= inputs; k += LANES) {                                                                            \
      _Pragma("GCC unroll 8") for (int i = 0; ahead && i < rows * LANES * (int)sizeof(type); i += 64)                    \
        __builtin_prefetch((const char *)(w + (size_t)rows * (inputs + k)) + i);                                         \
      vec ws[ROWS], xs[COLUMNS];                                                                                         \
      if (LANES == 16) {                                                                                                 \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {                                                         \
          ws[r] = load_(w + (size_t)r * inputs + k);                                                                     \
          KEEP(ws[r]);                                                                                                   \
        }                                                                                                                \
        _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) {                                                      \
          xs[c] = load(x + (size_t)c * inputs + k);                                                                      \
          KEEP(xs[c]);                                                                                                   \
          _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) sum[r][c] = fused(ws[r], xs[c], sum[r][c]);             \
        }                                                                                                                \
      } else {                                                                                                           \
        _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) xs[c] = load(x + (size_t)c * inputs + k);              \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {                                                         \
          ws[r] = load_(w + (size_t)r * inputs + k);                                                                     \
          _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) sum[r][c] = fused(ws[r], xs[c], sum[r][c]);          \
        }                                                                                                                \
      }                                                                                                                  \
    }                                                                                                                    \
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                                               \
    _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) {                                                          \
      float s = total(sum[r][c]);                                                                                        \
      for (int i = k; i < inputs; i++) s = fmaf(from_(w[(size_t)r * inputs + i]), x[(size_t)c * inputs + i], s);         \
      y[(size_t)c * width + r] = s;                                                                                      \
    }                                                                                                                    \
  }                                                                                                                      \
  inline_ void name##_columns(const int rows, int columns, int inputs, const type *w, const float *x, float *y,          \
                              int width) {                                                                               \
    int c = 0;                                                                                                           \
    for (; c + COLUMNS <= columns; c += COLUMNS)                                                                         \
      name(rows, COLUMNS, inputs, w, x + (size_t)c * inputs, y + (size_t)c * width, width);                              \
    x += (size_t)c * inputs, y += (size_t)c * width;                                                                     \
    switch (columns - c) {                                                                                               \
      case 1: name(rows, 1, inputs, w, x, y, width); break;                                                              \
      case 2: name(rows, 2, inputs, w, x, y, width); break;                                                              \
      case 3: name(rows, 3 < COLUMNS ? 3 : COLUMNS, inputs, w, x, y, width); break;                                      \
      case 4: name(rows, 4 < COLUMNS ? 4 : COLUMNS, inputs, w, x, y, width); break;                                      \
      case 5: name(rows, 5 < COLUMNS ? 5 : COLUMNS, inputs, w, x, y, width); break;                                      \
    }                                                                                                                    \
  }                                                                                                                      \
  static void name##_panel(int rows, int columns, int inputs, const type *w, const float *x, float *y, int width) {      \
    for (int begin = 0; begin < columns; begin += TOKENS) {                                                              \
      int some = columns - begin < TOKENS ? columns - begin : TOKENS, r = 0;                                             \
      const float *xs = x + (size_t)begin * inputs;                                                                      \
      float *ys = y + (size_t)begin * width;                                                                             \
      for (; r + ROWS <= rows; r += ROWS)                                                                                \
        name##_columns(ROWS, some, inputs, w + (size_t)r * inputs, xs, ys + r, width);                                   \
      for (; r < rows; r++) name##_columns(1, some, inputs, w + (size_t)r * inputs, xs, ys + r, width);                  \
    }                                                                                                                    \
  }

#define AS_IS(x) (x)
#ifdef BF16
DEFINE_TILE(multiply_floats, float, load, AS_IS, 0) /* mostly of weights that were widened just now */
DEFINE_TILE(multiply_weights, weight, load_weight, from_weight, 1)
#else
DEFINE_TILE(multiply_floats, float, load, AS_IS, 1)
#define multiply_weights_panel multiply_floats_panel
#endif

/* Some outputs of one linear layer for all tokens. */
static void multiply_panel(const Linear *l, int begin, int rows, int inputs, const float *x, int count, float *y, int width,
                           float *scratch) {
  const weight *w = l->w + (size_t)begin * inputs;
  y += begin;
#ifdef BF16
  if (count > 2 * COLUMNS) { /* widened once for all of them */
    for (int i = 0; i < rows * inputs; i++) scratch[i] = from_weight(w[i]);
    multiply_floats_panel(rows, count, inputs, scratch, x, y, width);
  } else {
    multiply_weights_panel(rows, count, inputs, w, x, y, width);
  }
#else
  (void)scratch;
  multiply_floats_panel(rows, count, inputs, w, x, y, width);
#endif
  if (l->bias)
    for (int c = 0; c < count; c++)
      for (int r = 0; r < rows; r++) y[(size_t)c * width + r] += l->bias[begin + r];
}

/* A·x of some tokens, those of one slot together. */
static void multiply_a(Stepper *e, const Site *s, const float *x, int begin, int end) {
  int ranks = s->members * s->rank;
  for (int from = begin, to; from < end; from = to) {
    int slot = e->t.slot[from];
    for (to = from + 1; to < end && e->t.slot[to] == slot;) to++;
    if (slot >= 0)
      multiply_floats_panel(ranks, to - from, s->inputs, s->a + (size_t)slot * ranks * s->inputs,
                            x + (size_t)from * s->inputs, e->low + (size_t)from * e->ranks, e->ranks);
  }
}

/* y = W·x and low = A·x, for all tokens; B·low comes in the next phase. */
static void multiply(Stepper *e, uint64_t phase, const Site *s, const float *x, int count, float *y, float *scratch) {
  int most = s->outputs / (4 * e->threads) / ROWS * ROWS; /* so that each thread finds several tasks */
  int panel = most > PANEL ? PANEL : most < ROWS ? ROWS : most;
  int upto[3], panels = 0, together = 2 * COLUMNS;
  for (int i = 0; i < s->members; i++) upto[i] = panels += (s->member[i].outputs + panel - 1) / panel;
  int tasks = panels + (s->rank ? (count + together - 1) / together : 0);
  for (int task; (task = take(e, phase, tasks)) >= 0; finish(e, phase, tasks)) {
    if (task >= panels) {
      int begin = (task - panels) * together;
      multiply_a(e, s, x, begin, begin + together < count ? begin + together : count);
      continue;
    }
    int i = 0, before = 0;
    float *to = y;
    for (; task >= upto[i]; i++) before = upto[i], to += s->member[i].outputs;
    const Linear *l = &s->member[i];
    int begin = (task - before) * panel, rows = l->outputs - begin < panel ? l->outputs - begin : panel;
    multiply_panel(l, begin, rows, s->inputs, x, count, to, s->outputs, scratch);
  }
  wait_for_all(e, phase);
}

/* y += B·low of one token. */
static void add_adapter(const Stepper *e, const Site *s, int token) {
  int slot = e->t.slot[token], from = 0;
  if (slot < 0 || !s->rank) return;
  const float *low = e->low + (size_t)token * e->ranks;
  const float *b = s->b + (size_t)slot * s->members * s->rank * s->outputs;
  float *y = e->y + (size_t)token * s->outputs;
  for (int i = 0; i < s->members; i++) {
    int to = from + s->member[i].outputs, o = from;
    for (; o + 4 * LANES <= to; o += 4 * LANES) {
      vec y0 = load(y + o), y1 = load(y + o + LANES), y2 = load(y + o + 2 * LANES), y3 = load(y + o + 3 * LANES);
      for (int r = 0; r < s->rank; r++) {
        const float *br = b + (size_t)r * s->outputs + o;
        vec lows = all(low[r]);
        y0 = fused(lows, load(br), y0), y1 = fused(lows, load(br + LANES), y1);
        y2 = fused(lows, load(br + 2 * LANES), y2), y3 = fused(lows, load(br + 3 * LANES), y3);
      }
      store(y + o, y0), store(y + o + LANES, y1), store(y + o + 2 * LANES, y2), store(y + o + 3 * LANES, y3);
    }
    for (int r = 0; r < s->rank; r++)
      for (int p = o; p < to; p++) y[p] = fmaf(low[r], b[(size_t)r * s->outputs + p], y[p]);
    low += s->rank, b += (size_t)s->rank * s->outputs, from = to;
  }
}

/* What is done for one token between the products. */

inline_ float dot(const float *x, const float *y, int size) {
  vec sum = {0};
  int i = 0;
  for (; i + LANES <= size; i += LANES) sum = fused(load(x + i), load(y + i), sum);
  float s = total(sum);
  for (; i < size; i++) s = fmaf(x[i], y[i], s);
  return s;
}

static void normalize(const Stepper *e, const float *x, const float *weights, int size, float *out) {
  float scale = 1.0f / sqrtf(dot(x, x, size) / size + e->m.eps);
  for (int i = 0; i < size; i++) out[i] = x[i] * scale * weights[i];
}

static void embed(Stepper *e, int token) {
  const weight *row = e->m.embedding + (size_t)e->t.id[token] * e->m.hidden;
  float *x = e->x + (size_t)token * e->m.hidden;
  for (int i = 0; i < e->m.hidden; i++) x[i] = from_weight(row[i]);
  normalize(e, x, e->m.layer[0].attention_norm, e->m.hidden, e->h + (size_t)token * e->m.hidden);
}

/* x += y; h = norm(x). */
static void add_and_normalize(Stepper *e, const Site *s, const float *weights, int token) {
  int hidden = e->m.hidden;
  float *x = e->x + (size_t)token * hidden, *y = e->y + (size_t)token * s->outputs;
  add_adapter(e, s, token);
  for (int i = 0; i < hidden; i++) x[i] += y[i];
  normalize(e, x, weights, hidden, e->h + (size_t)token * hidden);
}

/* Rotary positions; keys and values into the token's row. */
static void place(Stepper *e, const Layer *l, int token) {
  const Model *m = &e->m;
  int dim = m->dim, half = dim / 2, position = e->t.position[token];
  const float *cos = m->cos + (size_t)position * dim, *sin = m->sin + (size_t)position * dim;
  float *head = e->y + (size_t)token * l->qkv.outputs;
  size_t to = ((size_t)e->t.row[token] * m->kv_heads * m->length + position) * dim, stride = (size_t)m->length * dim;
  add_adapter(e, &l->qkv, token);
  for (int i = 0; i < m->heads + m->kv_heads; i++, head += dim) {
    const float *norm = i < m->heads ? l->q_norm : l->k_norm;
    if (norm) normalize(e, head, norm, dim, head);
    for (int d = 0; d < half; d++) {
      float x = head[d], y = head[d + half];
      head[d] = x * cos[d] - y * sin[d];
      head[d + half] = y * cos[d + half] + x * sin[d + half];
    }
    if (i >= m->heads)
      for (int d = 0; d < dim; d++) l->keys[to + (i - m->heads) * stride + d] = to_weight(head[d]);
  }
  for (int i = 0; i < m->kv_heads; i++, head += dim)
    for (int d = 0; d < dim; d++) l->values[to + i * stride + d] = to_weight(head[d]);
}

/* out[query] = Σ score[query][p] · v[p] / sum[query], for so many values of a head. */
inline_ void weigh(const int queries, const int vectors, int count, const float *score, size_t stride, const weight *v,
                   int dim, const float *sum, float **out, int d) {
  vec o[COLUMNS][4] = {0};
  for (int p = 0; p < count; p++)
    _Pragma("GCC unroll 4") for (int i = 0; i < vectors; i++) {
      vec vs = load_weight(v + (size_t)p * dim + d + i * LANES);
      _Pragma("GCC unroll 8") for (int q = 0; q < queries; q++) o[q][i] = fused(all(score[q * stride + p]), vs, o[q][i]);
    }
  for (int q = 0; q < queries; q++)
    for (int i = 0; i < vectors; i++) store(out[q] + d + i * LANES, o[q][i] / sum[q]);
}

static void weigh_all(const int queries, int count, const float *score, size_t stride, const weight *v, int dim,
                      const float *sum, float **out) {
  int d = 0;
  for (; d + 4 * LANES <= dim; d += 4 * LANES) weigh(queries, 4, count, score, stride, v, dim, sum, out, d);
  for (; d + LANES <= dim; d += LANES) weigh(queries, 1, count, score, stride, v, dim, sum, out, d);
  for (; d < dim; d++)
    for (int q = 0; q < queries; q++) {
      float o = 0;
      for (int p = 0; p < count; p++) o = fmaf(score[q * stride + p], from_weight(v[(size_t)p * dim + d]), o);
      out[q][d] = o / sum[q];
    }
}

/* Scores of the positions from … to-1 become their exponentials, all others of `count` zero; returns their sum. */
static float soften(float *score, int from, int to, int count, float scaling) {
  float highest = -INFINITY;
  vec sums = {0};
  for (int p = from; p < to; p++) {
    score[p] *= scaling;
    highest = score[p] > highest ? score[p] : highest;
  }
  for (int p = 0; p < from; p++) score[p] = 0;
  for (int p = to; p < to + LANES || p < count; p++) score[p] = -INFINITY;
  for (int p = from; p < to; p += LANES) {
    vec s = load(score + p);
    s = where(s == -INFINITY, all(0), exponential(s - highest));
    store(score + p, s);
    sums += s;
  }
  for (int p = to; p < count; p++) score[p] = 0;
  return total(sums);
}

/* Some tokens that follow each other in one row look at it with the heads that share a head of keys. */
static void attend(Stepper *e, const Layer *l, int begin, int end, int kv_head, float *scratch) {
  const Model *m = &e->m;
  int dim = m->dim, heads = m->heads / m->kv_heads, queries = (end - begin) * heads, window = l->window;
  int first = e->t.position[begin] + 1, from = window && first > window ? first - window : 0;
  int count = e->t.position[end - 1] + 1 - from;
  size_t at = (((size_t)e->t.row[begin] * m->kv_heads + kv_head) * m->length + from) * dim;
  size_t stride = m->length + LANES;
  float *q = scratch, *score = scratch + e->queries * dim, sum[COLUMNS], *out[COLUMNS];
  for (int i = begin; i < end; i++)
    memcpy(q + (size_t)(i - begin) * heads * dim, e->y + (size_t)i * l->qkv.outputs + kv_head * heads * dim,
           heads * dim * sizeof(float));
  multiply_weights_panel(count, queries, dim, l->keys + at, q, score, stride);
  for (int some, i = 0; i < queries; i += some, score += some * stride) {
    some = queries - i < COLUMNS ? queries - i : COLUMNS;
    for (int k = 0; k < some; k++) {
      int token = begin + (i + k) / heads, to = e->t.position[token] + 1 - from;
      sum[k] = soften(score + k * stride, window && to > window ? to - window : 0, to, count, m->scaling);
      out[k] = e->z + ((size_t)token * m->heads + kv_head * heads + (i + k) % heads) * dim;
    }
    switch (some) {
      case 1: weigh_all(1, count, score, stride, l->values + at, dim, sum, out); break;
      case 2: weigh_all(2, count, score, stride, l->values + at, dim, sum, out); break;
      case COLUMNS: weigh_all(COLUMNS, count, score, stride, l->values + at, dim, sum, out); break;
      default: weigh_all(some, count, score, stride, l->values + at, dim, sum, out);
    }
  }
}

/* One head of keys for a few tokens, those of each row together. */
static void attend_rows(Stepper *e, const Layer *l, int task, float *scratch) {
  int kv_head = task % e->m.kv_heads, begin = task / e->m.kv_heads * e->together, end = begin + e->together;
  if (end > e->t.count) end = e->t.count;
  for (int to; begin < end; begin = to) {
    for (to = begin + 1; to < end && e->t.row[to] == e->t.row[begin];) to++;
    attend(e, l, begin, to, kv_head, scratch);
  }
}

/* z = silu(gate) · up. */
static void activate(Stepper *e, const Site *s, int token) {
  int feed = e->m.feed, i = 0;
  const float *gate = e->y + (size_t)token * s->outputs, *up = gate + feed;
  float *z = e->z + (size_t)token * feed;
  add_adapter(e, s, token);
  for (; i + LANES <= feed; i += LANES) {
    vec g = load(gate + i);
    store(z + i, g / (1.0f + exponential(-g)) * load(up + i));
  }
  for (; i < feed; i++) z[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/* The step. */

#define EACH(index, count, what)                                                           \
  for (int index; (index = take(e, phase, count)) >= 0; finish(e, phase, count)) what;    \
  wait_for_all(e, phase++)
#define PHASES_A_LAYER 9
#define OTHER_PHASES 3

/* One thread's way through a step. */
static void walk(Stepper *e, int thread, uint64_t phase) {
  const Model *m = &e->m;
  const Tokens *t = &e->t;
  float *scratch = e->scratch + thread * e->scratch_size;
  EACH(i, t->count, embed(e, i));
  for (const Layer *l = m->layer; l < m->layer + m->layers; l++) {
    multiply(e, phase++, &l->qkv, e->h, t->count, e->y, scratch);
    EACH(i, t->count, place(e, l, i));
    EACH(i, (t->count + e->together - 1) / e->together * m->kv_heads, attend_rows(e, l, i, scratch));
    multiply(e, phase++, &l->o, e->z, t->count, e->y, scratch);
    EACH(i, t->count, add_and_normalize(e, &l->o, l->feed_norm, i));
    multiply(e, phase++, &l->gate_up, e->h, t->count, e->y, scratch);
    EACH(i, t->count, activate(e, &l->gate_up, i));
    multiply(e, phase++, &l->down, e->z, t->count, e->y, scratch);
    EACH(i, t->count, add_and_normalize(e, &l->down, l + 1 < m->layer + m->layers ? l[1].attention_norm : m->norm, i));
  }
  EACH(i, t->last_count,
       memcpy(e->z + (size_t)i * m->hidden, e->h + (size_t)t->last[i] * m->hidden, m->hidden * sizeof(float)));
  multiply(e, phase, &m->head, e->z, t->last_count, t->logits, scratch);
}

static void *work(void *given) {
  Worker worker = *(Worker *)given;
  Stepper *e = worker.e;
  free(given);
  for (uint64_t step = 0;;) {
    for (int spins = 0; spins < 400 && atomic_load(&e->step) == step; spins++) relax(0);
    if (atomic_load(&e->step) == step) {
      pthread_mutex_lock(&e->lock);
      while (atomic_load(&e->step) == step) pthread_cond_wait(&e->wake, &e->lock);
      pthread_mutex_unlock(&e->lock);
    }
    step = atomic_load(&e->step);
    if (atomic_load(&e->closing)) return NULL;
    walk(e, worker.number, (step - 1) * e->phases);
  }
}

static void begin_step(Stepper *e) {
  pthread_mutex_lock(&e->lock);
  atomic_fetch_add(&e->step, 1);
  pthread_cond_broadcast(&e->wake);
  pthread_mutex_unlock(&e->lock);
}

static int larger(int a, int b) { return a > b ? a : b; }

/* Room for so many tokens a step; -1 when there is no memory. */
static int make_room(Stepper *e, int count) {
  if (count <= e->room) return 0;
  float **all_[] = {&e->x, &e->h, &e->y, &e->z, &e->low};
  size_t sizes[] = {e->m.hidden, e->m.hidden, e->widest, e->deepest, e->ranks};
  e->room = 0;
  for (int i = 0; i < 5; i++) {
    free(*all_[i]);
    *all_[i] = aligned_alloc(64, (count * sizes[i] * sizeof(float) / 64 + 1) * 64);
    if (!*all_[i]) return -1;
  }
  e->room = count;
  return 0;
}

void heed_close(Stepper *e) {
  atomic_store(&e->closing, 1);
  begin_step(e);
  for (int i = 1; i < e->threads; i++) pthread_join(e->thread[i], NULL);
  free(e->x), free(e->h), free(e->y), free(e->z), free(e->low), free(e->scratch), free(e->thread), free(e);
}

/* NULL when memory or threads are short. What `model` points to must outlive the engine. */
Stepper *heed_open(const Model *model, int32_t threads) {
  const Layer *l = model->layer;
  Stepper *e = calloc(1, sizeof *e);
  if (!e) return NULL;
  e->m = *model;
  e->threads = 1;
  e->phases = PHASES_A_LAYER * model->layers + OTHER_PHASES;
  e->widest = larger(larger(l->qkv.outputs, l->gate_up.outputs), model->hidden);
  e->deepest = larger(larger(l->o.inputs, l->down.inputs), model->hidden);
  e->ranks = 3 * l->qkv.rank; /* q, k and v are the most that share an input */
  int heads = model->heads / model->kv_heads;
  e->together = larger(1, 4 * COLUMNS / heads);
  e->queries = e->together * heads;
  e->scratch_size = larger(PANEL * e->deepest, e->queries * (model->dim + model->length + LANES));
  e->scratch = aligned_alloc(64, (threads * e->scratch_size * sizeof(float) / 64 + 1) * 64);
  e->thread = calloc(threads, sizeof *e->thread);
  pthread_mutex_init(&e->lock, NULL);
  pthread_cond_init(&e->wake, NULL);
  for (int i = 1; i < threads && e->scratch && e->thread; i++) {
    Worker *worker = malloc(sizeof *worker);
    if (!worker) break;
    *worker = (Worker){e, i};
    if (pthread_create(&e->thread[i], NULL, work, worker)) {
      free(worker);
      break;
    }
    e->threads++;
  }
  if (e->scratch && e->thread && e->threads == threads) return e;
  heed_close(e);
  return NULL;
}

/* 0, or -1 when memory is short, -2 without tokens. One call at a time. */
int32_t heed_step(Stepper *e, const Tokens *tokens) {
  if (tokens->count < 1 || tokens->last_count < 1) return -2; /* a phase of no tasks would never end */
  if (make_room(e, tokens->count)) return -1;
  e->t = *tokens;
  begin_step(e);
  walk(e, 0, (atomic_load(&e->step) - 1) * e->phases);
  return 0;
}
