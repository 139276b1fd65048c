// Several vectors as one, so that as many chains of operations are under way at a time: processors do
// not look ahead far enough to overlap long ones on their own. On Zen 4 four at a time take two thirds
// of the time of one with the dynamic map and five sixths with FP8; shorter codecs gain nothing.

template <class N, int parts>
struct Wide {
    static constexpr uint64_t kLanes = N::kLanes * parts;

    struct Int {
        typename N::Int part[parts];
    };

    struct Float {
        typename N::Float part[parts];

        friend Float operator+(const Float& a, const Float& b) {
            Float result;
            for (int i = 0; i < parts; ++i) result.part[i] = a.part[i] + b.part[i];
            return result;
        }
        friend Float operator-(const Float& a, const Float& b) {
            Float result;
            for (int i = 0; i < parts; ++i) result.part[i] = a.part[i] - b.part[i];
            return result;
        }
        friend Float operator*(const Float& a, const Float& b) {
            Float result;
            for (int i = 0; i < parts; ++i) result.part[i] = a.part[i] * b.part[i];
            return result;
        }
        friend Float operator/(const Float& a, const Float& b) {
            Float result;
            for (int i = 0; i < parts; ++i) result.part[i] = a.part[i] / b.part[i];
            return result;
        }
    };

    // `of(i)` for each part.
    template <class Result, class Function>
    static Result each(Function of) {
        Result result;
        for (int i = 0; i < parts; ++i) result.part[i] = of(i);
        return result;
    }

#define EVERSTEP_EACH(result, call) each<result>([&](int i) { return N::call; })
    static Float broadcast(float x) { return EVERSTEP_EACH(Float, broadcast((void(i), x))); }
    static Int integers(int32_t x) { return EVERSTEP_EACH(Int, integers((void(i), x))); }
    static Float load(const float* at) { return EVERSTEP_EACH(Float, load(at + i * N::kLanes)); }
    static Int load_bytes(const int8_t* at) {
        return EVERSTEP_EACH(Int, load_bytes(at + i * N::kLanes));
    }
    static Int load_bytes(const uint8_t* at) {
        return EVERSTEP_EACH(Int, load_bytes(at + i * N::kLanes));
    }
    static Int load_halves(const uint16_t* at) {
        return EVERSTEP_EACH(Int, load_halves(at + i * N::kLanes));
    }
    static Float load_fp16(const uint16_t* at) {
        return EVERSTEP_EACH(Float, load_fp16(at + i * N::kLanes));
    }
    static void store(float* at, const Float& x) {
        for (int i = 0; i < parts; ++i) N::store(at + i * N::kLanes, x.part[i]);
    }
    static void store_bytes(uint8_t* at, const Int& x) {
        for (int i = 0; i < parts; ++i) N::store_bytes(at + i * N::kLanes, x.part[i]);
    }
    static void store_halves(uint16_t* at, const Int& x) {
        for (int i = 0; i < parts; ++i) N::store_halves(at + i * N::kLanes, x.part[i]);
    }
    static void store_fp16(uint16_t* at, const Float& x) {
        for (int i = 0; i < parts; ++i) N::store_fp16(at + i * N::kLanes, x.part[i]);
    }

    static Float root(const Float& x) { return EVERSTEP_EACH(Float, root(x.part[i])); }
    static Float sign(const Float& x) { return EVERSTEP_EACH(Float, sign(x.part[i])); }
    static Float floor(const Float& x) { return EVERSTEP_EACH(Float, floor(x.part[i])); }
    static Float magnitude(const Float& x) { return EVERSTEP_EACH(Float, magnitude(x.part[i])); }
    static Float least(const Float& a, const Float& b) {
        return EVERSTEP_EACH(Float, least(a.part[i], b.part[i]));
    }
    static Float most(const Float& a, const Float& b) {
        return EVERSTEP_EACH(Float, most(a.part[i], b.part[i]));
    }
    template <class Compared, class Chosen>
    static Chosen where_greater(const Compared& a, const Compared& b, const Chosen& yes,
                                const Chosen& no) {
        return EVERSTEP_EACH(Chosen,
                             where_greater(a.part[i], b.part[i], yes.part[i], no.part[i]));
    }

    static Int bits(const Float& x) { return EVERSTEP_EACH(Int, bits(x.part[i])); }
    static Float floats(const Int& x) { return EVERSTEP_EACH(Float, floats(x.part[i])); }
    static Float convert(const Int& x) { return EVERSTEP_EACH(Float, convert(x.part[i])); }
    static Int nearest(const Float& x) { return EVERSTEP_EACH(Int, nearest(x.part[i])); }
    static Int both(const Int& a, const Int& b) {
        return EVERSTEP_EACH(Int, both(a.part[i], b.part[i]));
    }
    static Int sum(const Int& a, const Int& b) {
        return EVERSTEP_EACH(Int, sum(a.part[i], b.part[i]));
    }
    static Int difference(const Int& a, const Int& b) {
        return EVERSTEP_EACH(Int, difference(a.part[i], b.part[i]));
    }
    template <int count>
    static Int left(const Int& x) { return EVERSTEP_EACH(Int, template left<count>(x.part[i])); }
    template <int count>
    static Int right(const Int& x) { return EVERSTEP_EACH(Int, template right<count>(x.part[i])); }
    static Int twice_and(const Int& index, const Float& a, const Float& b) {
        return EVERSTEP_EACH(Int, twice_and(index.part[i], a.part[i], b.part[i]));
    }
    static Int unsigned_most(const Int& a, const Int& b) {
        return EVERSTEP_EACH(Int, unsigned_most(a.part[i], b.part[i]));
    }
    static Int unsigned_least(const Int& a, const Int& b) {
        return EVERSTEP_EACH(Int, unsigned_least(a.part[i], b.part[i]));
    }
    static uint32_t unsigned_most_of(const Int& x) {
        typename N::Int most = x.part[0];
        for (int i = 1; i < parts; ++i) most = N::unsigned_most(most, x.part[i]);
        return N::unsigned_most_of(most);
    }
    static uint32_t unsigned_least_of(const Int& x) {
        typename N::Int least = x.part[0];
        for (int i = 1; i < parts; ++i) least = N::unsigned_least(least, x.part[i]);
        return N::unsigned_least_of(least);
    }

    template <int count>
    static Float entry(const float* table, const Int& index) {
        return EVERSTEP_EACH(Float, template entry<count>(table, index.part[i]));
    }
#undef EVERSTEP_EACH
};
