//! Own templates with every construct that published ones lean on.

use super::*;

fn chat(messages: &[(&str, &str)]) -> Vec<Message> {
    messages.iter().map(|&(role, content)| Message::new(role, content)).collect()
}

fn render(source: &str, messages: &[(&str, &str)]) -> Result<String> {
    let tokens = [
        ("bos_token", Some("<s>".to_owned())),
        ("eos_token", Some("</s>".to_owned())),
        ("pad_token", None),
    ];
    ChatTemplate::new("model/tokenizer_config.json", source, tokens).render(&chat(messages), true)
}

fn rendered(source: &str) -> String {
    render(source, &[("user", "hi")]).unwrap()
}

#[test]
fn a_brace_that_nothing_follows_is_an_error_of_the_template_and_not_of_ours() {
    for broken in ["{%}", "{%", "{{", "a{{}"] {
        assert_eq!(in_our_dialect(broken), broken);
        assert!(matches!(render(broken, &[]), Err(Error::Template { .. })), "{broken}");
    }
    assert_eq!(in_our_dialect("{%%}{{}}"), "{%%}{{}}");
}

#[test]
fn a_chatml_template_with_optional_system_message_and_tools_renders() {
    let source = "\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_user=0) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and ns.last_user == 0 %}{% set ns.last_user = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if message.content is string and message.reasoning_content is not defined %}
            {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
{#- the last user message -#}
{{- '[' ~ ns.last_user ~ ']' }}
";
    let messages =
        [("user", "hi"), ("assistant", "<think>hm</think>\n\nyes"), ("user", "x < y & \"z\"")];
    assert_eq!(
        render(source, &messages).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n\
         <|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nx < y & \"z\"<|im_end|>\n\
         <|im_start|>assistant\n[2]"
    );
}

#[test]
fn a_header_template_with_defaults_and_trimming_renders() {
    let source = "\
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}";
    assert_eq!(
        render(source, &[("system", " be kind "), ("user", "\n hi \n")]).unwrap(),
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nbe kind\
         <|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    );
}

#[test]
fn blocks_on_their_own_lines_leave_no_trace() {
    let source = "a\n  {% if true %}\nb\n  {% endif %}\nc\n{{ 'd' }}\n";
    assert_eq!(rendered(source), "a\nb\nc\nd");
}

#[test]
fn loops_can_skip_and_stop_and_macros_have_defaults() {
    let source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}\
                  {% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}\
                  {% macro say(x, end='!') %}{{ x }}{{ end }}{% endmacro %}{{ say('a') }}{{ say('b', end='?') }}";
    assert_eq!(rendered(source), "023a!b?");
}

#[test]
fn strings_have_pythons_methods() {
    let source = "{{ ' a '.strip() }}{{ 'ab'.startswith('a') }}{{ 'x-y'.split('-')[-1] }}\
                  {{ 'abc'.upper() }}{{ 'aab'.replace('a', '') }}{{ 'Ab'.lower() }}{{ 'xx1'.lstrip('x') }}\
                  {{ {'k': 1}.get('k') }}{% for k, v in {'p': 2}.items() %}{{ k }}{{ v }}{% endfor %}";
    assert_eq!(rendered(source).to_lowercase(), "atrueyabcbab11p2");
}

#[test]
fn json_is_written_as_python_writes_it() {
    let value = "{'name': 'é<&>\\'', 'list': [1, 2.5, none, true], 'empty': {}}";
    assert_eq!(
        rendered(&format!("{{{{ {value} | tojson }}}}")),
        r#"{"name": "é<&>'", "list": [1, 2.5, null, true], "empty": {}}"#
    );
    assert_eq!(
        rendered(&format!("{{{{ {value} | tojson(indent=2) }}}}")),
        "{\n  \"name\": \"é<&>'\",\n  \"list\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"empty\": {}\n}"
    );
    assert_eq!(rendered("{{ messages | tojson }}"), r#"[{"role": "user", "content": "hi"}]"#);
}

#[test]
fn absent_tokens_and_options_are_undefined_or_none() {
    let source = "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ tools is none }}\
                  {{ enable_thinking is defined }}[{{ pad_token }}]";
    assert_eq!(rendered(source).to_lowercase(), "<s></s>falsetruefalse[]");
    let source = "{{ tools is iterable }}{{ messages is iterable }}{{ 'text' is iterable }}{{ 1 is iterable }}\
                  {{ pad_token|length }}{{ messages|length }}{{ 'é!'|length }}";
    assert_eq!(rendered(source).to_lowercase(), "falsetruetruefalse012");
    assert!(render("{{ tools|length }}", &[]).is_err());
}

#[test]
fn generation_tags_print_nothing() {
    let source = "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}|{% endfor %}";
    assert_eq!(rendered(source), "hi|");
}

#[test]
fn reversing_nothing_gives_nothing() {
    let source = "{% for m in messages[1:][::-1] %}{{ m.content }}{% endfor %}{{ 'abc'[::-1] }}\
                  {{ messages[::-1][0].content }}{{ (messages[1:][::-1])|length }} [::-1]";
    assert_eq!(rendered(source), "cbahi0 [::-1]");
    let nothing = "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}.";
    assert_eq!(render(nothing, &[]).unwrap(), ".");
}

#[test]
fn a_template_that_breaks_the_engine_or_never_ends_is_an_error() {
    let broken = render("{{ messages[0:9:-1]|list }}", &[("user", "hi")]).unwrap_err();
    assert!(matches!(broken, Error::Template { .. }), "{broken}");
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}\
                   {% endfor %}{% endfor %}{% endfor %}";
    let endless = render(endless, &[]).unwrap_err().to_string();
    assert!(endless.contains("fuel"), "{endless}");
}

#[test]
fn the_date_is_formatted() {
    let date = rendered("{{ strftime_now('%Y-%m-%d') }}");
    assert_eq!(date.len(), 10, "{date}");
    assert!(date.as_str() > "2024-01-01", "{date}");
    let error = render("\n{{ strftime_now('%Q') }}", &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "model/tokenizer_config.json line 2: strftime_now: %Q is not supported"
    );
}

#[test]
fn a_refusal_of_the_template_is_an_error_with_its_message_and_line() {
    let source = "{% for m in messages %}\n{% if m.role == 'system' %}\n\
                  {{ raise_exception('System role not supported') }}\n{% endif %}{% endfor %}";
    assert_eq!(
        render(source, &[("system", "x")]).unwrap_err().to_string(),
        "model/tokenizer_config.json line 3: System role not supported"
    );
}

#[test]
fn errors_name_the_line() {
    for (source, line, part) in [
        ("a\n{% if %}", 2, "unexpected"),
        ("a\n\n{{ messages[0].nothing.at_all }}", 3, "undefined"),
        ("{{ no_such_function() }}", 1, "no_such_function"),
        ("\n{{ 'x'.no_such_method() }}", 2, "no_such_method"),
        ("{% for m in messages %}", 1, "unexpected"),
    ] {
        let error = render(source, &[("user", "hi")]).unwrap_err();
        let Error::Template { line: found, detail, .. } = &error else { panic!("{error}") };
        assert_eq!(*found, Some(line), "{error}");
        assert!(detail.contains(part), "{error}");
    }
}
