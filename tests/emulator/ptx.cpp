#include "emulator/ptx.h"

#include <cctype>
#include <cstring>

namespace emulator {

bool Statement::has(std::string_view modifier) const {
  for (const std::string& m : modifiers)
    if (m == modifier) return true;
  return false;
}

std::string Statement::text() const {
  std::string all = name;
  for (const std::string& m : modifiers) all += "." + m;
  return all;
}

namespace {

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

int bits_of(std::string_view type) {
  if (type == ".pred") return 1;
  const size_t digit = type.find_first_of("0123456789");
  return digit == type.npos ? 0 : std::stoi(std::string(type.substr(digit)));
}

// Reads words, numbers and marks; passes over white space, comments and line directives.
class Reader {
 public:
  Reader(std::string_view text, int line) : text_(text), line_(line) { skip(); }

  bool done() const { return at_ >= text_.size(); }
  char peek() const { return done() ? '\0' : text_[at_]; }
  int line() const { return line_; }
  size_t position() const { return at_; }

  bool take(char mark) {
    if (peek() != mark) return false;
    ++at_;
    skip();
    return true;
  }
  void expect(char mark) {
    if (!take(mark)) fail(std::string("'") + mark + "' expected before '" + std::string(text_.substr(at_, 40)) + "'");
  }
  // A name with all its dots and double colons; a single colon ends it.
  std::string word() {
    const size_t begin = at_;
    while (at_ < text_.size() && (is_word(text_[at_]) || text_.substr(at_, 2) == "::"))
      at_ += is_word(text_[at_]) ? 1 : 2;
    if (at_ == begin) fail("a name expected before '" + std::string(text_.substr(at_, 40)) + "'");
    const std::string found(text_.substr(begin, at_ - begin));
    skip();
    return found;
  }
  // 12, 0x1F, 12U, 0f3F800000 (an fp32's bits), 0d... (an fp64's).
  uint64_t number() {
    const bool negative = take('-');
    const std::string w = word();
    uint64_t value;
    if (w.size() == 10 && w[0] == '0' && (w[1] == 'f' || w[1] == 'F'))
      value = std::stoull(w.substr(2), nullptr, 16);
    else if (w.size() == 18 && w[0] == '0' && (w[1] == 'd' || w[1] == 'D'))
      value = std::stoull(w.substr(2), nullptr, 16);
    else
      value = std::stoull(w, nullptr, 0);
    return negative ? 0 - value : value;
  }
  // Everything up to the mark, which is passed over.
  std::string_view until(char mark) {
    const size_t begin = at_;
    while (!done() && text_[at_] != mark) step();
    const std::string_view found = text_.substr(begin, at_ - begin);
    expect(mark);
    return found;
  }
  // The text between braces, the first of which is next.
  std::string_view block() {
    expect('{');
    const size_t begin = at_;
    for (int depth = 1; !done(); step()) {
      if (text_[at_] == '{') ++depth;
      if (text_[at_] == '}' && --depth == 0) break;
    }
    const std::string_view found = text_.substr(begin, at_ - begin);
    expect('}');
    return found;
  }
  void skip_line() {
    while (!done() && text_[at_] != '\n') ++at_;
    skip();
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw Error("PTX line " + std::to_string(line_) + ": " + what);
  }

 private:
  void step() {
    if (text_[at_] == '\n') ++line_;
    ++at_;
  }
  void skip() {
    while (!done()) {
      if (std::isspace(static_cast<unsigned char>(text_[at_]))) {
        step();
      } else if (text_.substr(at_, 2) == "//") {
        while (!done() && text_[at_] != '\n') ++at_;
      } else {
        break;
      }
    }
  }
  std::string_view text_;
  size_t at_ = 0;
  int line_;
};

struct Declared {
  std::string type, name;
  int align = 1, count = 1;
  bool sized = false;  // with [n], or [] of unknown size
};

// .align 16 .b8 name[32]
Declared declaration(Reader& r) {
  Declared d;
  std::string w = r.word();
  for (; w[0] == '.'; w = r.word()) {
    if (w == ".align")
      d.align = static_cast<int>(r.number());
    else if (w != ".ptr" && w != ".global" && w != ".const" && w != ".shared" && w != ".visible")
      d.type = w;
  }
  d.name = w;
  while (r.take('[')) {
    d.sized = true;
    d.count *= r.peek() == ']' ? 0 : static_cast<int>(r.number());
    r.expect(']');
  }
  const int bytes = bits_of(d.type) / 8;
  if (d.align < bytes) d.align = bytes;
  return d;
}

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

class BodyParser {
 public:
  explicit BodyParser(Kernel& kernel) : kernel_(kernel), r_(kernel.body, kernel.line) {}

  void parse() {
    open();
    while (!r_.done()) {
      if (r_.take('{')) {
        open();
      } else if (r_.peek() == '}') {
        close();
        r_.expect('}');
      } else {
        statement();
      }
    }
    close();
    for (const Jump& jump : jumps_)
      if (!jump.found)
        throw Error("PTX line " + std::to_string(kernel_.statements[jump.statement].line) + ": no label " + jump.name);
  }

 private:
  struct Jump {
    size_t statement, depth;
    std::string name;
    bool found;
  };

  void open() { scopes_.emplace_back(), labels_.emplace_back(); }
  // Names stand for what the innermost scope makes of them; a label may come after its jumps.
  void close() {
    for (Jump& jump : jumps_) {
      if (jump.found || jump.depth < scopes_.size()) continue;
      const auto label = labels_.back().find(jump.name);
      if (label != labels_.back().end()) {
        jump.found = true;
        kernel_.statements[jump.statement].operands[0].bits = label->second;
      }
      jump.depth = scopes_.size() - 1;
    }
    scopes_.pop_back(), labels_.pop_back();
  }

  void statement() {
    if (r_.peek() == '@') {
      Statement s;
      guard(s);
      return instruction(std::move(s), r_.word());
    }
    const std::string w = r_.word();
    if (w[0] == '.') return directive(w);
    if (r_.peek() == ':') {
      r_.expect(':');
      labels_.back()[w] = kernel_.statements.size();
      return;
    }
    instruction({}, w);
  }

  void directive(const std::string& w) {
    if (w == ".loc" || w == ".file") return r_.skip_line();
    if (w == ".pragma") return void(r_.until(';'));
    if (w == ".reg") return registers();
    if (w == ".shared") {
      const Declared d = declaration(r_);
      kernel_.shared_bytes = round_up(kernel_.shared_bytes, d.align);
      kernel_.shared[d.name] = kernel_.shared_bytes;
      kernel_.shared_bytes += d.count * bits_of(d.type) / 8;
      return r_.expect(';');
    }
    r_.fail("unknown directive " + w);
  }

  void registers() {
    const int bits = bits_of(r_.word());
    do {
      const std::string name = r_.word();
      const int first = static_cast<int>(kernel_.registers.size());
      int count = 1;
      if (r_.take('<')) {
        count = static_cast<int>(r_.number());
        r_.expect('>');
        for (int i = 0; i < count; ++i) scopes_.back()[name + std::to_string(i)] = first + i;
      } else {
        scopes_.back()[name] = first;
      }
      kernel_.registers.resize(first + count, bits);
    } while (r_.take(','));
    r_.expect(';');
  }

  int find(const std::string& name) const {
    for (size_t i = scopes_.size(); i-- > 0;)
      if (const auto it = scopes_[i].find(name); it != scopes_[i].end()) return it->second;
    return -1;
  }

  void guard(Statement& s) {
    r_.expect('@');
    s.guard_negated = r_.take('!');
    const std::string name = r_.word();
    s.guard = find(name);
    if (s.guard < 0) r_.fail("unknown predicate " + name);
  }

  void instruction(Statement s, const std::string& w) {
    s.line = r_.line();
    size_t begin = 0;
    for (size_t end; begin <= w.size(); begin = end + 1) {
      end = w.find('.', begin);
      if (end == w.npos) end = w.size();
      if (begin == 0)
        s.name = w.substr(0, end);
      else
        s.modifiers.push_back(w.substr(begin, end - begin));
    }
    if (s.name == "call") {
      r_.until(';');  // refused when it is run
    } else {
      if (r_.peek() != ';') do {
          s.operands.push_back(operand());
        } while (r_.take(','));
      r_.expect(';');
    }
    if (s.name == "bra") {
      jumps_.push_back({kernel_.statements.size(), scopes_.size(), s.operands.at(0).name, false});
      s.operands[0].kind = Operand::label;
    }
    kernel_.statements.push_back(std::move(s));
  }

  Operand operand() {
    Operand o = simple();
    if (r_.take('|')) {
      Operand both;
      both.kind = Operand::pair;
      both.parts = {std::move(o), simple()};
      return both;
    }
    return o;
  }

  Operand simple() {
    Operand o;
    if (r_.take('[')) {
      o.kind = Operand::address;
      do {
        o.parts.push_back(simple());
      } while (r_.take(','));
      r_.expect(']');
      return o;
    }
    if (r_.take('{')) {
      o.kind = Operand::list;
      do {
        o.parts.push_back(simple());
      } while (r_.take(','));
      r_.expect('}');
      return o;
    }
    o.negated = r_.take('!');
    if (r_.peek() == '-' || std::isdigit(static_cast<unsigned char>(r_.peek()))) {
      o.kind = Operand::number;
      o.bits = r_.number();
      return o;
    }
    o.name = r_.word();
    if (o.name == "_") return o;
    o.index = find(o.name);
    o.kind = o.index >= 0 ? Operand::reg : o.name[0] == '%' ? Operand::special : Operand::symbol;
    if (r_.take('+')) o.bits = r_.number();
    return o;
  }

  Kernel& kernel_;
  Reader r_;
  std::vector<std::map<std::string, int>> scopes_;
  std::vector<std::map<std::string, size_t>> labels_;
  std::vector<Jump> jumps_;
};

}  // namespace

Module::Module(std::string given) : text(std::move(given)) {
  Reader r(text, 1);
  while (!r.done()) {
    const std::string w = r.word();
    if (w == ".version" || w == ".address_size") {
      r.word();
    } else if (w == ".target") {
      target = r.word();
      while (r.take(',')) r.word();
    } else if (w == ".file" || w == ".loc") {
      r.skip_line();
    } else if (w == ".section") {
      r.word();
      r.block();
    } else if (w == ".visible" || w == ".weak" || w == ".extern") {
      continue;  // of what follows
    } else if (w == ".global" || w == ".const") {
      const Declared d = declaration(r);
      std::vector<uint8_t>& bytes = variables[d.name];
      bytes.resize(size_t(d.count) * bits_of(d.type) / 8);
      if (r.take('=')) {
        const int width = bits_of(d.type) / 8;
        const bool braces = r.take('{');
        size_t at = 0;
        do {
          const uint64_t value = r.number();
          if (at + width > bytes.size()) r.fail("too many values of " + d.name);
          std::memcpy(&bytes[at], &value, width);
          at += width;
        } while (r.take(','));
        if (braces) r.expect('}');
      }
      r.expect(';');
    } else if (w == ".shared") {
      dynamic_shared[declaration(r).name] = true;
      r.expect(';');
    } else if (w == ".entry") {
      Kernel k;
      k.name = r.word();
      r.expect('(');
      k.signature = r.until(')');
      while (r.peek() != '{') {  // .maxntid and the like
        r.word();
        while (std::isdigit(static_cast<unsigned char>(r.peek())) || r.peek() == ',')
          if (!r.take(',')) r.number();
      }
      k.line = r.line();
      k.body = r.block();
      kernels.emplace(k.name, std::move(k));
    } else if (w == ".func") {
      r.until('{');  // called by nobody: `call` is refused
      r.fail("functions are not supported");
    } else {
      r.fail("unknown directive " + w);
    }
  }
}

Kernel& Module::kernel(const std::string& name) {
  const auto found = kernels.find(name);
  if (found == kernels.end()) throw Error("no PTX of kernel " + name);
  Kernel& k = found->second;
  if (k.parsed) return k;
  for (Reader r(k.signature, k.line); !r.done(); r.take(',')) {
    if (const std::string w = r.word(); w != ".param") r.fail(".param expected, not " + w);
    const Declared d = declaration(r);
    const int size = d.count * bits_of(d.type) / 8;
    k.parameter_bytes = round_up(k.parameter_bytes, d.align);
    k.parameters[d.name] = {k.parameter_bytes, size};
    k.parameter_bytes += size;
  }
  BodyParser(k).parse();
  k.parsed = true;
  return k;
}

}  // namespace emulator
