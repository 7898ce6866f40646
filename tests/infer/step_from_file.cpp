// Runs steps of a model from a file, so that the kernels of another CPU can be tried under an emulator.
// Written and read by test_other_cpus.py: numbers in order, arrays as a length in bytes and the bytes.

#include "step.cpp"

#include <cstdio>

namespace {

std::FILE* in;
std::vector<std::unique_ptr<char[]>> held;

int64_t number() {
    int64_t n = 0;
    if (std::fread(&n, sizeof n, 1, in) != 1) std::exit(3);
    return n;
}

double real() {
    double x = 0;
    if (std::fread(&x, sizeof x, 1, in) != 1) std::exit(3);
    return x;
}

template <class T>
const T* array() {  // null for an empty one
    const int64_t bytes = number();
    if (!bytes) return nullptr;
    held.emplace_back(new char[size_t(bytes) + 8192]);  // prefetching may run ahead
    if (std::fread(held.back().get(), size_t(bytes), 1, in) != 1) std::exit(3);
    return reinterpret_cast<const T*>(held.back().get());
}

Matrix matrix() {
    Matrix m;
    m.type = number(), m.out = number(), m.in = number(), m.digits = number();
    m.data = array<char>(), m.scales = array<char>(), m.minimums = array<char>();
    m.values = array<uint8_t>(), m.rare = array<Rare>(), m.rare_ends = array<int64_t>();
    return m;
}

}  // namespace

int main(int, char** arguments) {
    in = std::fopen(arguments[1], "rb");
    std::FILE* out = std::fopen(arguments[2], "wb");
    if (!in || !out) return 2;
    Model model;
    model.dim = number(), model.n_layers = number(), model.n_heads = number(), model.n_kv_heads = number();
    model.head_dim = number(), model.ffn_dim = number(), model.vocab_size = number();
    model.norm_eps = real(), model.rope_attention = real();
    std::vector<Layer> layers{size_t(model.n_layers)};
    for (Layer& layer : layers) {
        for (Matrix& m : layer.matrices) m = matrix();
        layer.attention_norm = array<float>(), layer.ffn_norm = array<float>();
    }
    model.layers = layers.data();
    model.head = matrix();
    model.embedding = array<char>(), model.embedding_bf16 = number();
    model.norm = array<float>(), model.frequencies = array<float>();
    model.n_blocks = number(), model.cache_bf16 = number();
    const int64_t keys = number(), values = number();  // bytes
    std::vector<char> key_memory(size_t(keys) + 64), value_memory(size_t(values) + 64);
    model.keys = key_memory.data(), model.values = value_memory.data();
    const auto engine = std::unique_ptr<Engine>(arriero_open(number()));
    for (int64_t batches = number(); batches; --batches) {
        Batch batch{};
        batch.n = number(), batch.table_width = number(), batch.n_outputs = number();
        batch.tokens = array<int64_t>(), batch.positions = array<int32_t>(), batch.sequences = array<int32_t>();
        batch.tables = array<int32_t>(), batch.outputs = array<int32_t>();
        const std::vector<const Adapter*> adapters(size_t(batch.n), nullptr);
        std::vector<float> logits(size_t(batch.n_outputs * model.vocab_size));
        batch.adapters = adapters.data(), batch.logits = logits.data();
        arriero_step(engine.get(), &model, &batch);
        std::fwrite(logits.data(), 4, logits.size(), out);
    }
    return std::fclose(out);
}
