-- Let a dead letter be written again, at its old place; what became of it.
-- ARGV: place, id.
local entry = redis.call('XRANGE', DEAD, ARGV[2], ARGV[2])[1]
if not entry then return 'none' end
local letter = named(entry[2])
local key, seq = letter.k, string.match(letter.q or '', '^%d+$')
if not (key and seq and letter.w and letter.d) then return 'unreadable' end
local state, now = known(key), clock()
if is_superseded(letter) then return 'superseded' end
begin()
redis.call('XDEL', DEAD, ARGV[2])
forget_letter(key)
local record = {seq = seq, w = letter.w, c = letter.c, h = letter.h, d = letter.d}
-- Where it is refused there were newer ones, or there is something else.
if type(add(key, record)) == 'table' then rebuild(key, now, record) end
count(1, #letter.d)
tidy(key, now)
if not is_held(state, now) then redis.call('ZADD', DUE, now, key) end
return 'done'
