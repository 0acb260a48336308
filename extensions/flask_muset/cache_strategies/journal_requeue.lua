-- Let a dead letter be written again, at its old place; what became of it.
-- ARGV: place, id.
local entry = redis.call('XRANGE', DEAD, ARGV[2], ARGV[2])[1]
if not entry then return 'none' end
local letter = named(entry[2])
local key, seq = letter.k, string.match(letter.q or '', '^%d+$')
if not (key and seq and letter.w and letter.d) then return 'unreadable' end
local state, now = known(key), clock()
if (tonumber(state['x' .. letter.w]) or 0) > tonumber(seq) then return 'superseded' end
begin()
redis.call('XDEL', DEAD, ARGV[2])
forget_letter(key)
rebuild(key, now, {seq = seq, w = letter.w, c = letter.c, h = letter.h, d = letter.d})
count(1, #letter.d)
tidy(key, now)
if not is_held(state, now) then redis.call('ZADD', DUE, now, key) end
return 'done'
